"""Attention over contiguous and paged keys and values: explicit scores, a full softmax, one sequence after another."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastllama.kernels.reference.numerics import wide
from fastllama.kernels.reference.quantize import dequantize_heads


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """One sequence: q [Lq, Hq, D], k and v [Lk, Hkv, D] -> out [Lq, Hq, D] in q's dtype, log-sum-exp [Lq, Hq].

    Causal masks are aligned to the bottom right: query i sees keys up to i + Lk - Lq. A query that sees no key gives 0
    and -inf.
    """
    (len_q, num_q_heads, head_dim), (len_k, num_kv_heads, _) = q.shape, k.shape
    group = num_q_heads // num_kv_heads
    queries = wide(q).view(len_q, num_kv_heads, group, head_dim)
    scores = torch.einsum("qhgd,khd->hgqk", queries * scale, wide(k))
    if causal:
        hidden = torch.ones(len_q, len_k, dtype=torch.bool, device=q.device).triu(len_k - len_q + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = scores.softmax(-1).masked_fill(lse[..., None] == float("-inf"), 0.0)
    out = torch.einsum("hgqk,khd->qhgd", weights, wide(v)).reshape(len_q, num_q_heads, head_dim)
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
    """Sequence b owns rows bounds[b] : bounds[b + 1] of q, k and v; rows of no sequence give 0 and -inf."""
    out, lse = torch.zeros_like(q), wide(q).new_full(q.shape[:2], float("-inf"))
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(bounds_q) - 1):
        rows, keys = slice(bounds_q[b], bounds_q[b + 1]), slice(bounds_k[b], bounds_k[b + 1])
        out[rows], lse[rows] = attend(q[rows], k[keys], v[keys], scale, causal)
    return out, lse * lse_unit(base2)


def lse_unit(base2: bool) -> float:
    """What a natural log-sum-exp is multiplied by."""
    return 1 / math.log(2) if base2 else 1.0


def check_lengths(lengths: list[int], page_table: Tensor, page_size: int) -> None:
    """Raise ValueError for a sequence longer than its pages, whose last tokens would be missing without a word."""
    if lengths and max(lengths) > page_table.shape[1] * page_size:
        raise ValueError(
            f"seq_lens has a length of {max(lengths)}; legal: at most {page_table.shape[1] * page_size}, "
            f"{page_table.shape[1]} pages of {page_size}"
        )


def gather_pages(pages: Tensor, scales: Tensor | None, page_ids: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """The first `length` tokens [length, heads, D] of a sequence in pages[page_ids]; pages [P, heads, page_size, D].

    Dequantized where there are scales, in fp32, or in fp64 for queries of that dtype.
    """
    _, heads, page_size, head_dim = pages.shape
    page_ids = page_ids[: -(-length // page_size)]
    held = pages.index_select(0, page_ids)
    if scales is not None:
        held = dequantize_heads(held, scales.index_select(0, page_ids), dtype)
    return held.transpose(1, 2).reshape(-1, heads, head_dim)[:length]


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
    base2: bool = False,
) -> tuple[Tensor, Tensor]:
    """New queries attend to the cached prefix and, causally, to themselves; their keys are in the pages already."""
    out, lse = torch.zeros_like(q), wide(q).new_full(q.shape[:2], float("-inf"))
    bounds, lengths = cu_seqlens_q.tolist(), seq_lens.tolist()
    check_lengths(lengths, page_table, k_pages.shape[2])
    for b, length in enumerate(lengths):
        rows = slice(bounds[b], bounds[b + 1])
        k, v = (
            gather_pages(pages, scales, page_table[b], length, q.dtype)
            for pages, scales in ((k_pages, k_scales), (v_pages, v_scales))
        )
        out[rows], lse[rows] = attend(q[rows], k, v, scale, causal=True)
    return out, lse * lse_unit(base2)


def attention_decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    scale: float,
    base2: bool = False,
) -> tuple[Tensor, Tensor]:
    """attention_prefill with the same number of queries, q.shape[0] // B, for each sequence."""
    num_seqs = seq_lens.shape[0]
    queries = q.shape[0] // max(num_seqs, 1)
    bounds = torch.arange(num_seqs + 1, dtype=torch.int32) * queries
    return attention_prefill(q, k_pages, v_pages, page_table, seq_lens, bounds, k_scales, v_scales, scale, base2)
