"""Attention over contiguous and paged keys and values: explicit scores, a full softmax, one sequence after another."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from fastllama.kernels.reference.numerics import wide
from fastllama.kernels.reference.quantize import dequantize_heads


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, v_scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One sequence: q [Lq, Hq, D], k and v [Lk, Hkv, D] -> out [Lq, Hq, D] in q's dtype, log-sum-exp [Lq, Hq].

    Causal masks are aligned to the bottom right: query i attends to keys up to i + Lk - Lq. A query without any key
    returns 0 and -inf. v_scale: multiplies the result.
    """
    (len_q, num_q_heads, head_dim), (len_k, num_kv_heads, _) = q.shape, k.shape
    group = num_q_heads // num_kv_heads
    queries = wide(q).view(len_q, num_kv_heads, group, head_dim)
    scores = torch.einsum("qhgd,khd->hgqk", queries * scale, wide(k))
    if causal:
        hidden = torch.ones(len_q, len_k, dtype=torch.bool, device=q.device).triu(len_k - len_q + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    lse = scores.logsumexp(-1)
    lse = lse.masked_fill(lse == math.inf, math.nan)  # an infinite score has no softmax
    weights = scores.softmax(-1).masked_fill(lse[..., None] == float("-inf"), 0.0)
    out = torch.einsum("hgqk,khd->qhgd", weights, wide(v)).reshape(len_q, num_q_heads, head_dim)
    if v_scale is not None:
        out = out * v_scale
    return out.to(q.dtype), lse.permute(2, 0, 1).reshape(len_q, num_q_heads)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    causal: bool = True,
    base2: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sequence b owns rows bounds[b] : bounds[b + 1] of q, k and v; rows of no sequence return 0 and -inf.

    Bounds that do not ascend from 0 to at most the number of rows return NaN everywhere.
    """
    out, lse = torch.zeros_like(q), wide(q).new_full(q.shape[:2], float("-inf"))
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    if not (ascend(bounds_q, q.shape[0]) and ascend(bounds_k, k.shape[0])):
        return out.fill_(math.nan), lse.fill_(math.nan)
    for b in range(len(bounds_q) - 1):
        rows, keys = slice(bounds_q[b], bounds_q[b + 1]), slice(bounds_k[b], bounds_k[b + 1])
        out[rows], lse[rows] = attend(q[rows], k[keys], v[keys], scale, causal)
    return out, lse * lse_unit(base2)


def lse_unit(base2: bool) -> float:
    """The factor from a natural log-sum-exp to the one returned."""
    return 1 / math.log(2) if base2 else 1.0


def score_scale(scale: float, k_scale: float | None) -> float:
    """The softmax scale of scores with keys that are still in units of k_scale."""
    return scale if k_scale is None else scale * k_scale


def ascend(bounds: list[int], rows: int) -> bool:
    """Whether bounds of sequences are legal: they start at 0, never descend, and end at most at `rows`."""
    return bounds[0] == 0 and bounds[-1] <= rows and all(a <= b for a, b in pairwise(bounds))


def room(pages: Tensor, page_table: Tensor) -> int:
    """The longest legal sequence: the tokens of all pages in a row of the page table."""
    num_pages, _, page_size, _ = pages.shape
    return page_table.shape[1] * page_size if num_pages else 0


def gather_pages(
    pages: Tensor, scales: Tensor | None, page_ids: Tensor, length: int, dtype: torch.dtype, missing: float
) -> tuple[Tensor, bool]:
    """The first `length` tokens [length, heads, D] of a sequence in pages[page_ids], and whether all its pages exist.

    pages: [P, heads, page_size, D]; pages that do not exist are filled with `missing`. Quantized pages are returned in
    fp32, or in fp64 for queries of that dtype; dequantized if there are scales.
    """
    num_pages, heads, page_size, head_dim = pages.shape
    page_ids = page_ids[: -(-length // page_size)]
    exists = (page_ids >= 0) & (page_ids < num_pages)
    page_ids = page_ids.clamp(0, max(num_pages - 1, 0))
    held = pages.index_select(0, page_ids)
    if scales is not None:
        held = dequantize_heads(held, scales.index_select(0, page_ids), dtype)
    elif held.dtype != dtype:
        held = held.to(torch.promote_types(dtype, torch.float32))
    complete = bool(exists.all())
    if not complete:
        held = held.masked_fill(~exists[:, None, None, None], missing)
    return held.transpose(1, 2).reshape(-1, heads, head_dim)[:length], complete


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
    causal: bool = True,
    base2: bool = False,
) -> tuple[Tensor, Tensor]:
    """New queries attend to the cached prefix and to each other; their keys and values are in the pages already.

    Returns NaN: everywhere for bounds that do not ascend, for a sequence whose length is negative or exceeds its row of
    the page table, and for a query that attends to a page that does not exist.
    """
    out, lse = torch.zeros_like(q), wide(q).new_full(q.shape[:2], float("-inf"))
    bounds, lengths = cu_seqlens_q.tolist(), seq_lens.tolist()
    if not ascend(bounds, q.shape[0]):
        return out.fill_(math.nan), lse.fill_(math.nan)
    for b, length in enumerate(lengths):
        rows = slice(bounds[b], bounds[b + 1])
        if not 0 <= length <= room(k_pages, page_table):
            out[rows], lse[rows] = math.nan, math.nan
            continue
        k, _ = gather_pages(k_pages, k_scales, page_table[b], length, q.dtype, missing=math.nan)
        v, _ = gather_pages(v_pages, v_scales, page_table[b], length, q.dtype, missing=0.0)
        out[rows], lse[rows] = attend(q[rows], k, v, score_scale(scale, k_scale), causal, v_scale)
    return out, lse * lse_unit(base2)


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
    causal: bool = True,
    base2: bool = False,
) -> tuple[Tensor, Tensor]:
    """`attention_prefill` with the same number of queries, q.shape[0] // B, for each sequence."""
    num_seqs = seq_lens.shape[0]
    queries = q.shape[0] // max(num_seqs, 1)
    bounds = torch.arange(num_seqs + 1, dtype=torch.int32, device=seq_lens.device) * queries
    scales = (k_scales, v_scales, k_scale, v_scale, scale)
    return attention_prefill(q, k_pages, v_pages, page_table, seq_lens, bounds, *scales, causal, base2)
