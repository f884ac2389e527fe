"""The ops attention_varlen, attention_prefill and attention_decode."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastllama.errors import check_dtype, check_shape
from fastllama.kernels import cpu, reference
from fastllama.kernels.dispatch.checks import (
    CODES,
    FLOATS,
    INTEGERS,
    check_elements,
    check_page_scales,
    check_tensor,
    check_workspace,
)
from fastllama.kernels.dispatch.op import Op
from fastllama.kernels.ops import values
from fastllama.kernels.ops.compiled import numba_kernels, triton_kernels
from fastllama.kernels.reference.numerics import wide_dtype


def _check_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    causal: bool,
    base2: bool,
    out: Tensor,
    lse_out: Tensor | None,
) -> None:
    _check_heads(q, k, v, ("k", "v"), ("Tk", "Hkv", "D"))
    bounds = cu_seqlens_q.shape
    if len(bounds) != 1 or not bounds[0]:
        raise ValueError(f"cu_seqlens_q has shape {list(bounds)}; legal: [B + 1]")
    check_elements("cu_seqlens_q", cu_seqlens_q, INTEGERS)
    check_tensor("cu_seqlens_k", cu_seqlens_k, bounds, INTEGERS)
    _check_outputs(q, out, lse_out)


def _check_prefill(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    k_scale: float | None,
    v_scale: float | None,
    scale: float,
    causal: bool,
    base2: bool,
    out: Tensor,
    lse_out: Tensor | None,
) -> None:
    num_seqs = _check_paged(q, k_pages, v_pages, page_table, seq_lens, k_scales, v_scales, k_scale, v_scale)
    check_tensor("cu_seqlens_q", cu_seqlens_q, (num_seqs + 1,), INTEGERS)
    _check_outputs(q, out, lse_out)


def _check_decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    k_scale: float | None,
    v_scale: float | None,
    scale: float,
    causal: bool,
    base2: bool,
    out: Tensor,
    lse_out: Tensor | None,
    workspace: Tensor | None,
) -> None:
    num_seqs = _check_paged(q, k_pages, v_pages, page_table, seq_lens, k_scales, v_scales, k_scale, v_scale)
    if (rows := q.shape[0]) != num_seqs and (num_seqs == 0 or rows % num_seqs):
        raise ValueError(f"q has shape {list(q.shape)}; legal: [B * Q, Hq, D] for the {num_seqs} sequences in seq_lens")
    _check_outputs(q, out, lse_out)
    check_workspace(workspace, torch.float32)


def _check_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    names: tuple[str, str],
    dims: tuple[str, ...],
    codes: tuple[torch.dtype, ...] = (),
) -> None:
    """Check q [T, Hq, D], and keys and values of dimensions `dims`: heads in the second, q's D in the last.

    `codes`: dtypes of quantized keys and values, legal beside q's own.
    """
    check_shape("q", q, ("T", "Hq", "D"))
    shape, keys = q.shape, k.shape
    check_shape(names[0], k, (*dims[:-1], shape[2]))
    heads = keys[1]
    if not (heads and keys[2] and keys[-1]) or shape[1] % heads:
        raise ValueError(
            f"{names[0]} has shape {list(keys)}; legal: [{', '.join(dims)}], all but the first at least 1, "
            f"and Hkv a divisor of q's {shape[1]} heads"
        )
    check_elements("q", q, FLOATS)
    check_elements(names[0], k, (*codes, q.dtype))
    check_tensor(names[1], v, keys, (k.dtype,))


def _check_paged(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    k_scale: float | None,
    v_scale: float | None,
) -> int:
    """Check what prefill and decode share. Returns the number of sequences."""
    _check_heads(q, k_pages, v_pages, ("k_pages", "v_pages"), ("P", "Hkv", "page_size", "D"), CODES)
    check_page_scales(k_scales, v_scales, k_scale, v_scale, k_pages)
    check_shape("page_table", page_table, ("B", "max_pages"))
    check_elements("page_table", page_table, INTEGERS)
    num_seqs = page_table.shape[0]
    check_tensor("seq_lens", seq_lens, (num_seqs,), INTEGERS)
    return num_seqs


def _check_outputs(q: Tensor, out: Tensor, lse_out: Tensor | None) -> None:
    """Check out, like q, and lse_out [T, Hq] with any strides."""
    check_tensor("out", out, q.shape, (q.dtype,))
    if lse_out is not None:
        check_shape("lse_out", lse_out, q.shape[:2])
        check_dtype("lse_out", lse_out, (wide_dtype(q),))


_VARLEN = Op(
    "attention_varlen(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, float scale, "
    "bool causal, bool base2, Tensor(a!) out, Tensor(b!)? lse_out) -> ()",
    check=_check_varlen,
    reference=reference.attention_varlen,
    values=values.check_varlen,
    in_place={"out": {"q": 1}},
    cpu=cpu.attention_varlen,
    triton=triton_kernels,
)
_PREFILL = Op(
    "attention_prefill(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table, Tensor seq_lens, "
    "Tensor cu_seqlens_q, Tensor? k_scales, Tensor? v_scales, float? k_scale, float? v_scale, float scale, "
    "bool causal, bool base2, Tensor(a!) out, Tensor(b!)? lse_out) -> ()",
    check=_check_prefill,
    reference=reference.attention_prefill,
    values=values.check_prefill,
    in_place={"out": {"q": 1}},
    cpu=cpu.attention_prefill,
    numba=numba_kernels,
    triton=triton_kernels,
)
_DECODE = Op(
    "attention_decode(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table, Tensor seq_lens, "
    "Tensor? k_scales, Tensor? v_scales, float? k_scale, float? v_scale, float scale, bool causal, bool base2, "
    "Tensor(a!) out, Tensor(b!)? lse_out, Tensor(c!)? workspace) -> ()",
    check=_check_decode,
    reference=reference.attention_decode,
    values=values.check_decode,
    in_place={"out": {"q": 1}},
    cpu=cpu.attention_decode,
    numba=numba_kernels,
    triton=triton_kernels,
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
    lse_out: Tensor | None = None,
    return_lse: bool = False,
    base2: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of packed sequences with contiguous keys and values: softmax(scale * q k^T) v.

    q: [Tq, Hq, D], k, v: [Tk, Hkv, D], one floating dtype, last dimension contiguous, Hq a multiple of Hkv (query head
    h reads key head h // (Hq / Hkv)). cu_seqlens_q, cu_seqlens_k: [B + 1], each int32 or int64, row bounds of each
    sequence, from 0; rows past the last bound belong to no sequence and return 0. scale: defaults to 1 / sqrt(D).
    causal: bottom-right aligned (query i of Lq attends to keys up to i + Lk - Lq); False: every query of a sequence
    attends to all its keys. A query without any key returns 0 and the log-sum-exp -inf.
    Bounds that do not ascend from 0 to at most the number of rows return NaN everywhere.
    out: like q, may be q itself; allocated when None. Returns out, or with return_lse or lse_out (out, lse_out): the
    log-sum-exp of the scaled scores, natural, or with base2 to base 2, as FlashInfer's.
    lse_out: [Tq, Hq] fp32 (fp64 for q of that dtype), any strides (a transposed view is flash-attn's [Hq, Tq]).
    Softmax and accumulation in fp32. Raises ValueError for a shape, stride or device, TypeError for a dtype; nothing
    is written then.
    Source: Vaswani et al., Attention Is All You Need (2017); GQA: Ainslie et al. (2023).

    Example:
        >>> q, k, v = torch.randn(5, 4, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8)
        >>> bounds = torch.tensor([0, 2, 5])  # sequences of 2 and 3 tokens
        >>> out = kernels.attention_varlen(q, k, v, bounds, bounds)
        >>> torch.allclose(out[2], v[2].repeat_interleave(2, 0))  # a first token attends to itself alone
        True
    """
    out, lse_out = _outputs(q, out, lse_out, return_lse)
    _VARLEN(q, k, v, cu_seqlens_q, cu_seqlens_k, _scale(scale, q), causal, base2, out, lse_out)
    return out if lse_out is None else (out, lse_out)


def attention_prefill(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    scale: float | None = None,
    causal: bool = True,
    out: Tensor | None = None,
    lse_out: Tensor | None = None,
    return_lse: bool = False,
    base2: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of new queries over paged keys and values: the cached prefix and the queries' own tokens.

    q: [T, Hq, D], last dimension contiguous. k_pages, v_pages: [P, Hkv, page_size, D], any strides but the last; the
    new tokens' keys and values are written already. page_table: [B, max_pages], pages of each sequence in order;
    entries past its length are not read. seq_lens: [B], tokens of each sequence including the new ones. cu_seqlens_q:
    [B + 1], row bounds of each sequence's queries, which are its last tokens. These three: each int32 or int64.
    k_scales, v_scales: [P, Hkv, page_size] fp32, for pages of int8 or float8_e4m3fn, which are dequantized as they are
    read: value * scale, as `rope_and_write_kv` wrote them (an fp8 NaN, which it never writes, may be read as 480).
    k_scale, v_scale: one scale for all keys and one for all values, for pages of any dtype; legal where k_scales and
    v_scales are None. Quantized pages need either both tensors or both numbers.
    Returns NaN: everywhere for bounds that do not ascend from 0 to at most T, for a sequence whose length is negative
    or exceeds its row of page_table, and for a query that attends to a page outside of the pool.
    scale, causal, out, lse_out, return_lse, base2, numerics: as `attention_varlen`.
    Raises ValueError for a shape, stride or device, TypeError for a dtype; nothing is written then.
    Source: Kwon et al., Efficient Memory Management for LLM Serving with PagedAttention (2023).

    Example:
        >>> q, k_pages, v_pages = torch.randn(5, 4, 8), torch.randn(3, 2, 16, 8), torch.ones(3, 2, 16, 8)
        >>> page_table, seq_lens = torch.tensor([[2, 0]]), torch.tensor([20])  # 15 cached tokens and 5 new ones
        >>> out = kernels.attention_prefill(q, k_pages, v_pages, page_table, seq_lens, torch.tensor([0, 5]))
        >>> torch.allclose(out, torch.ones(5, 4, 8))  # the weights add up to 1
        True
    """
    out, lse_out = _outputs(q, out, lse_out, return_lse)
    scales = (k_scales, v_scales, k_scale, v_scale, _scale(scale, q))
    _PREFILL(q, k_pages, v_pages, page_table, seq_lens, cu_seqlens_q, *scales, causal, base2, out, lse_out)
    return out if lse_out is None else (out, lse_out)


def attention_decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    *,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    scale: float | None = None,
    causal: bool = True,
    out: Tensor | None = None,
    lse_out: Tensor | None = None,
    return_lse: bool = False,
    base2: bool = False,
    workspace: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Decode attention: the last Q tokens of every sequence over its paged keys and values.

    q: [B * Q, Hq, D], Q the same for all sequences: 1 when decoding, more when verifying draft tokens. A sequence of
    length 0 is padding and returns 0. workspace: scratch memory from `attention_workspace`; allocated when None and
    needed. Everything else: as `attention_prefill`.
    Raises ValueError for a shape, stride or device, TypeError for a dtype; nothing is written then.
    Source: Kwon et al., Efficient Memory Management for LLM Serving with PagedAttention (2023).

    Example:
        >>> q, k_pages, v_pages = torch.randn(1, 4, 8), torch.randn(3, 2, 16, 8), torch.ones(3, 2, 16, 8)
        >>> page_table, seq_lens = torch.tensor([[2, 0]]), torch.tensor([20])  # 16 tokens in page 2, 4 in page 0
        >>> out = kernels.attention_decode(q, k_pages, v_pages, page_table, seq_lens)
        >>> torch.allclose(out, torch.ones(1, 4, 8))  # the weights add up to 1
        True
    """
    out, lse_out = _outputs(q, out, lse_out, return_lse)
    scales = (k_scales, v_scales, k_scale, v_scale, _scale(scale, q))
    _DECODE(q, k_pages, v_pages, page_table, seq_lens, *scales, causal, base2, out, lse_out, workspace)
    return out if lse_out is None else (out, lse_out)


def attention_workspace(q: Tensor, k_pages: Tensor, page_table: Tensor) -> Tensor:
    """Scratch memory for `attention_decode` of tensors of these shapes, reused from call to call: [N] fp32.

    Where a Triton kernel runs, D + 1 numbers for each query, head and split of 512 tokens (or as tuned) of the page
    table's width; empty elsewhere. Not to be shared by overlapping calls.

    Example:
        >>> q, k_pages, page_table = torch.zeros(1, 4, 8), torch.zeros(3, 2, 16, 8), torch.tensor([[2, 0]])
        >>> kernels.attention_workspace(q, k_pages, page_table).shape  # a CPU needs none
        torch.Size([0])
    """
    return _DECODE.workspace(q.device, torch.float32, q, k_pages, page_table)


def _scale(scale: float | None, q: Tensor) -> float:
    """`scale`, or 1 / sqrt(D) when None. q may not have been checked yet."""
    return 1.0 / math.sqrt(math.prod(q.shape[-1:]) or 1) if scale is None else scale


def _outputs(q: Tensor, out: Tensor | None, lse_out: Tensor | None, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    if out is None:
        out = torch.empty_like(q)
    if lse_out is None and return_lse:
        lse_out = torch.empty(q.shape[:2], dtype=wide_dtype(q), device=q.device)
    return out, lse_out
