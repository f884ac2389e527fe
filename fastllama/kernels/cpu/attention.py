"""Attention on a CPU: torch's blocked kernel for prompts, two batched products over grouped heads for single queries.

Keys and values are widened to fp32 first: products in bf16 and fp16 run at a fifth of fp32's rate on CPUs without
hardware for them, and scaled_dot_product_attention spends 250 us on one query where the two products need 30.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllama.kernels.reference.attention import attend, check_lengths, gather_pages, lse_unit
from fastllama.kernels.reference.numerics import wide


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    causal: bool,
    base2: bool,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """See kernels.attention_varlen."""
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    out[bounds_q[-1] :].zero_()
    if lse is not None:
        lse[bounds_q[-1] :].fill_(float("-inf"))
    for b in range(len(bounds_q) - 1):
        rows, keys = slice(bounds_q[b], bounds_q[b + 1]), slice(bounds_k[b], bounds_k[b + 1])
        k_b, v_b = (wide(x[keys]).transpose(0, 1) for x in (k, v))
        _attend(q[rows], k_b, v_b, scale, causal, out[rows], None if lse is None else lse[rows])
    if lse is not None:
        lse.mul_(lse_unit(base2))


def attention_prefill(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    scale: float,
    base2: bool,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """See kernels.attention_prefill."""
    held = ((k_pages, k_scales), (v_pages, v_scales))
    _paged(q, held, page_table, seq_lens.tolist(), cu_seqlens_q.tolist(), scale, base2, out, lse)


def attention_decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    scale: float,
    base2: bool,
    out: Tensor,
    lse: Tensor | None,
    workspace: Tensor | None,
) -> None:
    """See kernels.attention_decode."""
    lengths = seq_lens.tolist()
    queries = q.shape[0] // max(len(lengths), 1)
    bounds = [b * queries for b in range(len(lengths) + 1)]
    held = ((k_pages, k_scales), (v_pages, v_scales))
    _paged(q, held, page_table, lengths, bounds, scale, base2, out, lse)


def _paged(
    q: Tensor,
    held: tuple[tuple[Tensor, Tensor | None], ...],
    page_table: Tensor,
    lengths: list[int],
    bounds: list[int],
    scale: float,
    base2: bool,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    check_lengths(lengths, page_table, held[0][0].shape[2])
    out[bounds[-1] :].zero_()
    if lse is not None:
        lse[bounds[-1] :].fill_(float("-inf"))
    for b, length in enumerate(lengths):
        rows = slice(bounds[b], bounds[b + 1])
        k, v = (_gather(*each, page_table[b], length, q.dtype) for each in held)
        _attend(q[rows], k, v, scale, True, out[rows], None if lse is None else lse[rows])
    if lse is not None:
        lse.mul_(lse_unit(base2))


def _gather(pages: Tensor, scales: Tensor | None, page_ids: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """The first `length` tokens of a sequence as [heads, length, D] in fp32."""
    return wide(gather_pages(pages, scales, page_ids, length, dtype)).transpose(0, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, out: Tensor, lse: Tensor | None) -> None:
    """One sequence: q, out [Lq, Hq, D]; k, v [Hkv, Lk, D] in fp32; lse [Lq, Hq] or None."""
    (len_q, num_q_heads, head_dim), (num_kv_heads, len_k, _) = q.shape, k.shape
    if len_q == 1:
        scores = torch.bmm(wide(q).view(num_kv_heads, -1, head_dim) * scale, k.transpose(1, 2))
        if lse is not None:
            lse.copy_(scores.logsumexp(-1).view(1, num_q_heads))
        out.copy_(torch.bmm(scores.softmax(-1), v).view(1, num_q_heads, head_dim))
    elif lse is not None or len_k < len_q:
        result, sums = attend(q, k.transpose(0, 1), v.transpose(0, 1), scale, causal)
        out.copy_(result)
        if lse is not None:
            lse.copy_(sums)
    elif len_q > 0:
        hidden = causal and len_q != len_k
        mask = torch.ones(len_q, len_k, dtype=torch.bool).tril(len_k - len_q) if hidden else None
        group = num_q_heads // num_kv_heads
        k, v = (x.repeat_interleave(group, dim=0)[None] for x in (k, v)) if group > 1 else (k[None], v[None])
        heads_first = wide(q).transpose(0, 1)[None]
        result = F.scaled_dot_product_attention(heads_first, k, v, mask, is_causal=causal and not hidden, scale=scale)
        out.copy_(result[0].transpose(0, 1))
