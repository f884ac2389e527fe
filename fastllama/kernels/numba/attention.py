"""Decode attention over pages: keys and values are read where they lie, once for all query heads of a group."""

from __future__ import annotations

import numba
import numpy as np
from torch import Tensor

from fastllama.kernels import cpu
from fastllama.kernels.numba.numerics import LIKE, exp, jit, load, parallel_jit, store, use_threads
from fastllama.kernels.reference.attention import lse_unit


@jit
def first_illegal(page_table, seq_lens, num_pages, page_size):
    """The first sequence that names a page outside the pool or is longer than its pages; -1 if there is none."""
    for seq in range(seq_lens.shape[0]):
        used = (seq_lens[seq] + page_size - 1) // page_size
        if seq_lens[seq] < 0 or used > page_table.shape[1]:
            return seq
        for i in range(used):
            if not 0 <= page_table[seq, i] < num_pages:
                return seq
    return -1


@jit
def softmax(scores):
    """Scores become weights; returns their log-sum-exp."""
    top = scores[0]
    for token in range(1, scores.shape[0]):
        top = max(top, scores[token])
    total = np.float32(0)
    for token in range(scores.shape[0]):
        scores[token] = exp(scores[token] - top)
        total += scores[token]
    for token in range(scores.shape[0]):
        scores[token] /= total
    return top + np.log(total)


# One iteration owns one key/value head of one sequence, with all its queries. Strides count elements. Writes nothing
# and returns the first sequence whose pages do not exist, if there is one, else -1.
@parallel_jit
def decode_kernel(
    q_ptr,
    k_pages_ptr,
    v_pages_ptr,
    out_ptr,
    lse_ptr,
    page_table,
    seq_lens,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    num_queries,
    num_kv_heads,
    group,
    head_dim,
    num_pages,
    page_size,
    scale,
    lse_unit,
    like,
):
    illegal = first_illegal(page_table, seq_lens, num_pages, page_size)
    work = seq_lens.shape[0] * num_kv_heads if illegal < 0 else 0
    for item in numba.prange(work):
        seq, kv_head = np.int64(item) // num_kv_heads, np.int64(item) % num_kv_heads
        scores = np.empty((group, max(seq_lens[seq], 1)), np.float32)
        queries, result = np.empty((group, head_dim), np.float32), np.empty((group, head_dim), np.float32)
        for query in range(num_queries):
            row = seq * num_queries + query
            visible = max(seq_lens[seq] - num_queries + query + 1, 0)
            for g in range(group):
                at = row * q_strides[0] + (kv_head * group + g) * q_strides[1]
                for i in range(head_dim):
                    queries[g, i] = load(q_ptr, at + i, like) * np.float32(scale)
            for token in range(visible):
                page, offset = page_table[seq, token // page_size], token % page_size
                at = page * k_strides[0] + kv_head * k_strides[1] + offset * k_strides[2]
                for g in range(group):
                    score = np.float32(0)
                    for i in range(head_dim):
                        score += queries[g, i] * load(k_pages_ptr, at + i, like)
                    scores[g, token] = score
            for g in range(group):
                total = softmax(scores[g, :visible]) if visible > 0 else np.float32(-np.inf)
                if lse_ptr != 0:
                    total *= np.float32(lse_unit)
                    store(lse_ptr, (row * num_kv_heads + kv_head) * group + g, total, np.float32(0))
            result[:] = np.float32(0)
            for token in range(visible):
                page, offset = page_table[seq, token // page_size], token % page_size
                at = page * v_strides[0] + kv_head * v_strides[1] + offset * v_strides[2]
                for g in range(group):
                    weight = scores[g, token]
                    for i in range(head_dim):
                        result[g, i] += weight * load(v_pages_ptr, at + i, like)
            for g in range(group):
                at = row * out_strides[0] + (kv_head * group + g) * out_strides[1]
                for i in range(head_dim):
                    store(out_ptr, at + i, result[g, i], like)
    return illegal


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
    """See kernels.attention_decode. Raises ValueError for a page that does not exist, writing nothing."""
    like = LIKE.get(q.dtype)
    if like is None or k_scales is not None:
        cpu.attention_decode(
            q, k_pages, v_pages, page_table, seq_lens, k_scales, v_scales, scale, base2, out, lse, workspace
        )
        return
    rows, num_q_heads, head_dim = q.shape
    if rows == 0:
        return
    num_pages, num_kv_heads, page_size, _ = k_pages.shape
    use_threads(2 * q.numel() * page_table.shape[1] * page_size)
    illegal = decode_kernel(
        q.data_ptr(),
        k_pages.data_ptr(),
        v_pages.data_ptr(),
        out.data_ptr(),
        0 if lse is None else lse.data_ptr(),
        page_table.numpy(),
        seq_lens.numpy(),
        q.stride(),
        k_pages.stride(),
        v_pages.stride(),
        out.stride(),
        rows // seq_lens.shape[0],
        num_kv_heads,
        num_q_heads // num_kv_heads,
        head_dim,
        num_pages,
        page_size,
        scale,
        lse_unit(base2),
        like,
    )
    if illegal >= 0:
        raise ValueError(
            f"sequence {illegal} has length {int(seq_lens[illegal])} and pages {page_table[illegal].tolist()}; legal: "
            f"page ids from 0 to {num_pages - 1}, and enough of them for the length"
        )
