"""Attention on a CPU: torch's blocked kernel for prompts, two batched matmuls over grouped heads for single queries.

Keys and values are widened to fp32 first: matmuls in bf16 and fp16 run at a fifth of fp32's rate on CPUs without
hardware for them, and scaled_dot_product_attention spends 250 us on one query where the two matmuls need 30. For the
results of illegal lengths, pages and bounds see kernels/reference/attention.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastllama.kernels.reference.attention import ascend, attend, gather_pages, lse_unit, room, score_scale
from fastllama.kernels.reference.numerics import wide

# The kernel of scaled_dot_product_attention on a CPU, unless the program selects another (sdpa_kernel); it returns the
# log-sum-exps as well, without all scores in memory.
_blocked = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


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
    lse_out: Tensor | None,
) -> None:
    """See kernels.attention_varlen."""
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    if not (ascend(bounds_q, q.shape[0]) and ascend(bounds_k, k.shape[0])):
        _fill(out, lse_out, math.nan, math.nan)
        return
    _fill(out[bounds_q[-1] :], None if lse_out is None else lse_out[bounds_q[-1] :], 0.0, -math.inf)
    for b in range(len(bounds_q) - 1):
        rows, keys = slice(bounds_q[b], bounds_q[b + 1]), slice(bounds_k[b], bounds_k[b + 1])
        k_b, v_b = (wide(x[keys]).transpose(0, 1) for x in (k, v))
        _attend(q[rows], k_b, v_b, scale, causal, None, out[rows], None if lse_out is None else lse_out[rows])
    if lse_out is not None:
        lse_out.mul_(lse_unit(base2))


def attention_prefill(
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
    """See kernels.attention_prefill."""
    held, scale = ((k_pages, k_scales), (v_pages, v_scales)), score_scale(scale, k_scale)
    bounds = cu_seqlens_q.tolist()
    if ascend(bounds, q.shape[0]):
        _paged(q, held, page_table, seq_lens.tolist(), bounds, scale, causal, v_scale, base2, out, lse_out)
    else:
        _fill(out, lse_out, math.nan, math.nan)


def attention_decode(
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
    """See kernels.attention_decode."""
    lengths = seq_lens.tolist()
    queries = q.shape[0] // max(len(lengths), 1)
    bounds = [b * queries for b in range(len(lengths) + 1)]
    held, scale = ((k_pages, k_scales), (v_pages, v_scales)), score_scale(scale, k_scale)
    _paged(q, held, page_table, lengths, bounds, scale, causal, v_scale, base2, out, lse_out)


def _paged(
    q: Tensor,
    held: tuple[tuple[Tensor, Tensor | None], ...],
    page_table: Tensor,
    lengths: list[int],
    bounds: list[int],
    scale: float,
    causal: bool,
    v_scale: float | None,
    base2: bool,
    out: Tensor,
    lse_out: Tensor | None,
) -> None:
    _fill(out[bounds[-1] :], None if lse_out is None else lse_out[bounds[-1] :], 0.0, -math.inf)
    (k_pages, k_scales), (v_pages, v_scales) = held
    longest = room(k_pages, page_table)
    for b, length in enumerate(lengths):
        rows = slice(bounds[b], bounds[b + 1])
        own_lse = None if lse_out is None else lse_out[rows]
        if not 0 <= length <= longest:
            _fill(out[rows], own_lse, math.nan, math.nan)
            continue
        k, complete = gather_pages(k_pages, k_scales, page_table[b], length, q.dtype, missing=math.nan)
        v, _ = gather_pages(v_pages, v_scales, page_table[b], length, q.dtype, missing=0.0)
        if complete:
            k, v = wide(k).transpose(0, 1), wide(v).transpose(0, 1)
            _attend(q[rows], k, v, scale, causal, v_scale, out[rows], own_lse)
        else:  # NaN, which torch's kernel would spread to queries that do not see it
            _explicit(q[rows], k, v, scale, causal, v_scale, out[rows], own_lse)
    if lse_out is not None:
        lse_out.mul_(lse_unit(base2))


def _fill(out: Tensor, lse_out: Tensor | None, value: float, lse_value: float) -> None:
    out.fill_(value)
    if lse_out is not None:
        lse_out.fill_(lse_value)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    v_scale: float | None,
    out: Tensor,
    lse_out: Tensor | None,
) -> None:
    """One sequence: q, out [Lq, Hq, D]; k, v [Hkv, Lk, D] in fp32; lse_out [Lq, Hq] or None."""
    (len_q, num_q_heads, head_dim), (num_kv_heads, len_k, _) = q.shape, k.shape
    if not q.numel():
        return
    queries = wide(q)
    if not scale > 0:  # torch's kernel masks before it scales
        queries, scale = queries * scale, 1.0
    hidden = len_k - len_q if causal else 0  # keys that the first query sees beyond those of a square mask
    if not len_k or hidden < 0 or not _scores_are_finite(queries, k, scale):
        _explicit(queries, k.transpose(0, 1), v.transpose(0, 1), scale, causal, v_scale, out, lse_out)
    elif len_q == 1:
        scores = torch.bmm(queries.view(num_kv_heads, -1, head_dim) * scale, k.transpose(1, 2))
        if lse_out is not None:
            lse_out.copy_(scores.logsumexp(-1).view(1, num_q_heads))
        _store(out, torch.bmm(scores.softmax(-1), v).view(1, num_q_heads, head_dim), v_scale)
    else:
        mask = None
        if hidden:
            mask = torch.full((len_q, len_k), -math.inf, dtype=k.dtype, device=q.device).triu(hidden + 1)
        group = num_q_heads // num_kv_heads
        k, v = (x.repeat_interleave(group, dim=0)[None] for x in (k, v)) if group > 1 else (k[None], v[None])
        is_causal = causal and mask is None
        result, sums = _blocked(queries.transpose(0, 1)[None], k, v, 0.0, is_causal, attn_mask=mask, scale=scale)
        _store(out, result[0].transpose(0, 1), v_scale)
        if lse_out is not None:
            lse_out.copy_(sums[0].T)


def _scores_are_finite(q: Tensor, k: Tensor, scale: float) -> bool:
    """Whether no score can be infinite or NaN, which an additive mask would spread to queries that do not see it.

    The bound is the Euclidean norm of all queries times that of all keys: one pass over each.
    """
    return math.prod(float(torch.linalg.vector_norm(x)) for x in (q, k)) * scale < torch.finfo(k.dtype).max


def _store(out: Tensor, result: Tensor, v_scale: float | None) -> None:
    out.copy_(result if v_scale is None else result * v_scale)


def _explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    v_scale: float | None,
    out: Tensor,
    lse_out: Tensor | None,
) -> None:
    """One sequence, all its scores at once: q, out [Lq, Hq, D]; k, v [Lk, Hkv, D]; lse_out [Lq, Hq] or None."""
    result, sums = attend(q, k, v, scale, causal, v_scale)
    out.copy_(result)
    if lse_out is not None:
        lse_out.copy_(sums)
