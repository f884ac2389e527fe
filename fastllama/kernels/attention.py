"""attention_varlen, attention_prefill, attention_decode."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastllama.errors import check_shape
from fastllama.kernels import cpu, reference
from fastllama.kernels.checks import FLOATS, check_tensor
from fastllama.kernels.op import Op

_INT32 = (torch.int32,)
_VARLEN = Op(
    "attention_varlen(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, float scale, "
    "bool causal, Tensor(a!) out, Tensor(b!)? lse) -> ()",
    reference=reference.attention_varlen,
    cpu=cpu.attention_varlen,
)
_PREFILL = Op(
    "attention_prefill(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table, Tensor seq_lens, "
    "Tensor cu_seqlens_q, float scale, Tensor(a!) out, Tensor(b!)? lse) -> ()",
    reference=reference.attention_prefill,
    cpu=cpu.attention_prefill,
)
_DECODE = Op(
    "attention_decode(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table, Tensor seq_lens, float scale, "
    "Tensor(a!) out, Tensor(b!)? lse) -> ()",
    reference=reference.attention_decode,
    cpu=cpu.attention_decode,
)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of packed sequences with contiguous keys and values: softmax(scale * q k^T) v.

    q: [Tq, Hq, D], k, v: [Tk, Hkv, D], one floating dtype, last dimension contiguous, Hq a multiple of Hkv (query head
    h reads key head h // (Hq / Hkv)). cu_seqlens_q, cu_seqlens_k: [B + 1] int32, row bounds of each sequence, from 0;
    rows past the last bound belong to no sequence and give 0. scale: defaults to 1 / sqrt(D). causal: bottom-right
    aligned (query i of Lq sees keys up to i + Lk - Lq); a query that sees no key gives 0 and the log-sum-exp -inf.
    out: like q; allocated when None. Returns out, or (out, lse [Tq, Hq] fp32, natural log) with return_lse.
    Softmax and accumulation in fp32. Raises ValueError for a shape, stride or device, TypeError for a dtype; nothing
    is written then.
    Source: Vaswani et al., Attention Is All You Need (2017); GQA: Ainslie et al. (2023).
    """
    if q.dim() != 3 or k.dim() != 3:
        check_shape("q", q, ("Tq", "Hq", "D"))
        check_shape("k", k, ("Tk", "Hkv", "D"))
    _check_keys(q, k, v, ("k", "v"), (k.shape[0], k.shape[1], q.shape[2]))
    if cu_seqlens_q.dim() != 1 or not cu_seqlens_q.numel():
        raise ValueError(f"cu_seqlens_q has shape {list(cu_seqlens_q.shape)}; legal: [B + 1]")
    check_tensor("cu_seqlens_q", cu_seqlens_q, cu_seqlens_q.shape, _INT32)
    check_tensor("cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.shape, _INT32)
    out, lse = _outputs(q, out, return_lse)
    _VARLEN(q, k, v, cu_seqlens_q, cu_seqlens_k, _scale(scale, q), causal, out, lse)
    return out if lse is None else (out, lse)


def attention_prefill(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    scale: float | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of new queries over paged keys and values: the cached prefix and the queries' own tokens.

    q: [T, Hq, D], last dimension contiguous. k_pages, v_pages: [P, Hkv, page_size, D], any strides but the last; the
    new tokens' keys and values are written already. page_table: [B, max_pages] int32, pages of each sequence in order;
    entries past its length are not read. seq_lens: [B] int32, tokens of each sequence including the new ones.
    cu_seqlens_q: [B + 1] int32, row bounds of each sequence's queries, which are its last tokens.
    scale, out, return_lse, numerics: as `attention_varlen`.
    Raises ValueError for a shape, stride or device, TypeError for a dtype; nothing is written then.
    Source: Kwon et al., Efficient Memory Management for LLM Serving with PagedAttention (2023).
    """
    _check_paged(q, k_pages, v_pages, page_table, seq_lens)
    check_tensor("cu_seqlens_q", cu_seqlens_q, (seq_lens.shape[0] + 1,), _INT32)
    out, lse = _outputs(q, out, return_lse)
    _PREFILL(q, k_pages, v_pages, page_table, seq_lens, cu_seqlens_q, _scale(scale, q), out, lse)
    return out if lse is None else (out, lse)


def attention_decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    *,
    scale: float | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the newest tokens, the same few for each sequence, over paged keys and values.

    q: [B * Q, Hq, D]: each sequence's last Q tokens (1 when decoding, more when verifying drafts), causal. A sequence
    of length 0 is padding and gives 0. Everything else: as `attention_prefill`.
    Raises ValueError for a shape, stride or device, TypeError for a dtype; nothing is written then.
    Source: Kwon et al., Efficient Memory Management for LLM Serving with PagedAttention (2023).
    """
    _check_paged(q, k_pages, v_pages, page_table, seq_lens)
    num_seqs = seq_lens.shape[0]
    if q.shape[0] != num_seqs and (num_seqs == 0 or q.shape[0] % num_seqs):
        raise ValueError(f"q has {q.shape[0]} rows; legal: a multiple of the {num_seqs} sequences in seq_lens")
    out, lse = _outputs(q, out, return_lse)
    _DECODE(q, k_pages, v_pages, page_table, seq_lens, _scale(scale, q), out, lse)
    return out if lse is None else (out, lse)


def _scale(scale: float | None, q: Tensor) -> float:
    return 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale


def _outputs(q: Tensor, out: Tensor | None, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    if out is None:
        out = torch.empty_like(q)
    else:
        check_tensor("out", out, q.shape, (q.dtype,))
    if not return_lse:
        return out, None
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out, torch.empty(q.shape[:2], dtype=dtype, device=q.device)


def _check_keys(q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str], shape: tuple[int, ...]) -> None:
    """q [T, Hq, D] and keys and values with heads in dimension 1, of the given shape."""
    check_tensor("q", q, q.shape, FLOATS)
    check_tensor(names[0], k, shape, (q.dtype,))
    check_tensor(names[1], v, shape, (q.dtype,))
    _, num_q_heads, head_dim = q.shape
    if not (shape[1] and head_dim) or num_q_heads % shape[1]:
        raise ValueError(
            f"q has shape {list(q.shape)}; legal: [T, Hq, D] with D >= 1 and Hq a multiple of the {shape[1]} heads "
            f"of {names[0]}"
        )


def _check_paged(q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, seq_lens: Tensor) -> None:
    if q.dim() != 3 or k_pages.dim() != 4 or not k_pages.shape[2]:
        check_shape("q", q, ("T", "Hq", "D"))
        check_shape("k_pages", k_pages, ("P", "Hkv", "page_size", "D"))
        raise ValueError(f"k_pages has shape {list(k_pages.shape)}; legal: [P, Hkv, page_size, D] with page_size >= 1")
    _check_keys(q, k_pages, v_pages, ("k_pages", "v_pages"), (*k_pages.shape[:3], q.shape[2]))
    if page_table.dim() != 2:
        check_shape("page_table", page_table, ("B", "max_pages"))
    check_tensor("page_table", page_table, page_table.shape, _INT32)
    check_tensor("seq_lens", seq_lens, page_table.shape[:1], _INT32)
