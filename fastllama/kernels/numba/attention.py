"""Attention of a few queries over pages: keys and values are read in place, once for all heads of a group."""

from __future__ import annotations

from itertools import pairwise
from operator import mul

import numpy as np
from torch import Tensor

from fastllama.kernels import cpu
from fastllama.kernels.dispatch.checks import as_int32
from fastllama.kernels.numba.numerics import LIKE, exp, jit, load, load_integer, store
from fastllama.kernels.numba.pieces import enter, leave, proceed
from fastllama.kernels.numba.threads import launch
from fastllama.kernels.reference.attention import ascend, lse_unit, room, score_scale

INT32 = np.int32(0)
SHORT_WORK = 1 << 26  # multiplications of a step's prompts: 128 tokens of a 1.1B model


@jit
def softmax(scores):
    """Turn scores into weights, in place; returns their log-sum-exp. If all are -inf, no key is seen."""
    top = scores[0]
    for token in range(1, scores.shape[0]):
        top = max(top, scores[token])
    if top == -np.inf and not np.isnan(scores).any():
        scores[:] = np.float32(0)
        return top
    total = np.float32(0)
    for token in range(scores.shape[0]):
        scores[token] = exp(scores[token] - top)
        total += scores[token]
    for token in range(scores.shape[0]):
        scores[token] /= total
    return top + np.log(total)


# One iteration owns one key/value head of one sequence, with all its queries. Strides count elements. A length that is
# negative or above `longest` gives NaN, and so does a page outside the pool to the queries that see it: the first page
# is read in its place.
@jit
def attention_paged_kernel(region, *args):
    (
        q_ptr,
        k_pages_ptr,
        v_pages_ptr,
        out_ptr,
        lse_ptr,
        page_table_ptr,
        seq_lens_ptr,
        table_stride,
        cu_seqlens_q_ptr,
        q_strides,
        k_strides,
        v_strides,
        out_strides,
        lse_strides,
        queries_of_each,
        num_kv_heads,
        group,
        head_dim,
        num_pages,
        page_size,
        longest,
        scale,
        v_scale,
        causal,
        lse_unit,
        like,
    ) = args
    first, last = enter(region, args)
    while first < last:
        for item in range(first, last):
            seq, kv_head = item // num_kv_heads, item % num_kv_heads
            length, pages = load_integer(seq_lens_ptr, seq, INT32), seq * table_stride
            exists = 0 <= length <= longest
            scores = np.empty((group, max(length, 1) if exists else 1), np.float32)
            queries, result = np.empty((group, head_dim), np.float32), np.empty((group, head_dim), np.float32)
            start, stop = seq * queries_of_each, (seq + 1) * queries_of_each
            if cu_seqlens_q_ptr != 0:
                start, stop = load_integer(cu_seqlens_q_ptr, seq, INT32), load_integer(cu_seqlens_q_ptr, seq + 1, INT32)
            for row in range(start, stop):
                hidden = stop - row - 1 if causal else 0
                visible = max(length - hidden, 0) if exists else 0
                for g in range(group):
                    at = row * q_strides[0] + (kv_head * group + g) * q_strides[1]
                    for i in range(head_dim):
                        queries[g, i] = load(q_ptr, at + i, like) * np.float32(scale)
                for token in range(visible):
                    page = load_integer(page_table_ptr, pages + token // page_size, INT32)
                    in_pool = 0 <= page < num_pages
                    page = page if in_pool else 0
                    at = page * k_strides[0] + kv_head * k_strides[1] + token % page_size * k_strides[2]
                    for g in range(group):
                        score = np.float32(0) if in_pool else np.float32(np.nan)
                        for i in range(head_dim):
                            score += queries[g, i] * load(k_pages_ptr, at + i, like)
                        scores[g, token] = score
                for g in range(group):
                    total = np.float32(-np.inf) if exists else np.float32(np.nan)
                    if visible > 0:
                        total = softmax(scores[g, :visible])
                    if lse_ptr != 0:
                        total *= np.float32(lse_unit)
                        at = row * lse_strides[0] + (kv_head * group + g) * lse_strides[1]
                        store(lse_ptr, at, total, np.float32(0))
                for g in range(group):
                    for i in range(head_dim):
                        result[g, i] = np.float32(0) if exists else np.float32(np.nan)
                for token in range(visible):
                    page = load_integer(page_table_ptr, pages + token // page_size, INT32)
                    page = page if 0 <= page < num_pages else 0
                    at = page * v_strides[0] + kv_head * v_strides[1] + token % page_size * v_strides[2]
                    for g in range(group):
                        weight = scores[g, token]
                        for i in range(head_dim):
                            result[g, i] += weight * load(v_pages_ptr, at + i, like)
                for g in range(group):
                    at = row * out_strides[0] + (kv_head * group + g) * out_strides[1]
                    for i in range(head_dim):
                        store(out_ptr, at + i, result[g, i] * np.float32(v_scale), like)
        first, last = proceed(region)
    return leave(region)


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
    if q.dtype not in LIKE or k_pages.dtype != q.dtype:
        scales = (k_scales, v_scales, k_scale, v_scale, scale)
        cpu.attention_decode(q, k_pages, v_pages, page_table, seq_lens, *scales, causal, base2, out, lse_out, workspace)
    elif q.numel():
        work = 2 * q.numel() * page_table.shape[1] * k_pages.shape[2]
        scale = score_scale(scale, k_scale)
        _attend(q, k_pages, v_pages, page_table, seq_lens, None, v_scale, scale, causal, base2, out, lse_out, work)


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
    """See kernels.attention_prefill. Short prompts run the kernel of attention_decode.

    torch's kernel wakes all its threads for the smallest prompt: 6 ms on a machine that is busy otherwise.
    """
    bounds, (_, num_q_heads, head_dim) = cu_seqlens_q.tolist(), q.shape
    queries = [end - start for start, end in pairwise(bounds)]
    longest = room(k_pages, page_table)
    lengths = [length if 0 <= length <= longest else 0 for length in seq_lens.tolist()]
    work = 2 * sum(map(mul, queries, lengths)) * num_q_heads * head_dim
    if q.dtype not in LIKE or k_pages.dtype != q.dtype or work > SHORT_WORK or not ascend(bounds, q.shape[0]):
        scales = (k_scales, v_scales, k_scale, v_scale, scale)
        cpu.attention_prefill(
            q, k_pages, v_pages, page_table, seq_lens, cu_seqlens_q, *scales, causal, base2, out, lse_out
        )
        return
    scale = score_scale(scale, k_scale)
    _attend(q, k_pages, v_pages, page_table, seq_lens, cu_seqlens_q, v_scale, scale, causal, base2, out, lse_out, work)
    out[bounds[-1] :].zero_()
    if lse_out is not None:
        lse_out[bounds[-1] :].fill_(float("-inf"))


def _attend(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor | None,
    v_scale: float | None,
    scale: float,
    causal: bool,
    base2: bool,
    out: Tensor,
    lse_out: Tensor | None,
    work: int,
) -> None:
    """Launch the kernel for all sequences, with equally many queries each if cu_seqlens_q is None."""
    rows, num_q_heads, head_dim = q.shape
    num_pages, num_kv_heads, page_size, _ = k_pages.shape
    num_seqs = page_table.shape[0]
    page_table, seq_lens = as_int32(page_table), as_int32(seq_lens)
    cu_seqlens_q = None if cu_seqlens_q is None else as_int32(cu_seqlens_q)
    launch(
        attention_paged_kernel,
        num_seqs * num_kv_heads,
        work,
        q.data_ptr(),
        k_pages.data_ptr(),
        v_pages.data_ptr(),
        out.data_ptr(),
        0 if lse_out is None else lse_out.data_ptr(),
        page_table.data_ptr(),
        seq_lens.data_ptr(),
        page_table.stride(0),
        0 if cu_seqlens_q is None else cu_seqlens_q.data_ptr(),
        q.stride(),
        k_pages.stride(),
        v_pages.stride(),
        out.stride(),
        (0, 0) if lse_out is None else lse_out.stride(),
        rows // max(num_seqs, 1),
        num_kv_heads,
        num_q_heads // num_kv_heads,
        head_dim,
        num_pages,
        page_size,
        room(k_pages, page_table),
        scale,
        1.0 if v_scale is None else float(v_scale),
        causal,
        lse_unit(base2),
        LIKE[q.dtype],
    )
