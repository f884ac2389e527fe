"""Cases of attention: packed, and over unquantized or 8-bit pages, with and without the log-sum-exp."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastllama.catalogue import attention as calls
from fastllama.catalogue.maker import Arguments, Maker
from fastllama.verify import oracle
from fastllama.verify.case import FormulaCase, Results, given

# One scale for all keys and one for all values, instead of tensors of scales.
ONE_SCALE: Arguments = {"k_scales": None, "v_scales": None, "k_scale": 0.02, "v_scale": 1.5}


def one_row(results: Results) -> Results:
    """The log-sum-exps as one row: a single one may be near 0, but its error is relative to the scores."""
    out, *sums = results
    return (out, *(lse.flatten() for lse in sums))


def varlen(m: Maker) -> Iterator[FormulaCase]:
    def formula(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, causal: bool) -> Results:
        ends = zip(*(starts[1:].tolist() for starts in (cu_seqlens_q, cu_seqlens_k)), strict=True)
        parts, first_q, first_k = [], 0, 0
        for end_q, end_k in ends:
            rows, keys = slice(first_q, end_q), slice(first_k, end_k)
            parts.append(oracle.attention(q[rows], k[keys], v[keys], 1 / math.sqrt(q.shape[-1]), causal))
            first_q, first_k = end_q, end_k
        return _joined(parts)

    for heads, kv_heads, dim, causal in ((8, 2, 64, True), (8, 8, 128, False)):
        call = calls.attention_varlen(m, (7, 1, 33), (7, 90, 70), heads, kv_heads, dim, causal=causal)
        label = f"q [41, {heads}, {dim}], {kv_heads} KV heads{', causal' if causal else ''}"
        yield from _with_and_without_lse("attention_varlen", label, call, formula)


def prefill(m: Maker) -> Iterator[FormulaCase]:
    lengths, fresh = (40, 17, 130), (5, 17, 64)
    for heads, kv_heads, dim, page in ((8, 2, 64, 16), (4, 4, 128, 64)):
        call = calls.attention_prefill(m, lengths, fresh, heads, kv_heads, dim, page=page)
        label = f"q [86, {heads}, {dim}], {kv_heads} KV heads, page size {page}"
        yield from _with_and_without_lse("attention_prefill", label, call, _paged)
    held = calls.paged(m, lengths, 2, 64, page=16, pages_dtype=torch.int8)
    call = calls.attention_prefill(m, lengths, fresh, 8, 2, 64, held=held)
    yield _rounded_pages("attention_prefill", "q [86, 8, 64]", call)
    call = calls.attention_prefill(m, lengths, fresh, 8, 2, 64, held=held | ONE_SCALE, causal=False)
    yield _rounded_pages("attention_prefill", "q [86, 8, 64]", call, ", one scale, not causal")


def decode(m: Maker) -> Iterator[FormulaCase]:
    lengths = (3, 16, 33, 200)
    for heads, kv_heads, dim, page, queries in ((8, 2, 64, 16, 1), (4, 4, 128, 64, 1), (8, 1, 64, 16, 3)):
        call = calls.attention_decode(m, lengths, heads, kv_heads, dim, page=page, queries=queries)
        label = f"q [{queries * len(lengths)}, {heads}, {dim}], {kv_heads} KV heads, page size {page}"
        yield from _with_and_without_lse("attention_decode", label, call, _paged)
    held = calls.paged(m, lengths, 2, 64, page=16, pages_dtype=torch.int8)
    call = calls.attention_decode(m, lengths, 8, 2, 64, held=held)
    yield _rounded_pages("attention_decode", "q [4, 8, 64]", call)
    call = calls.attention_decode(m, lengths, 8, 2, 64, held=held | ONE_SCALE, queries=3, causal=False)
    yield _rounded_pages("attention_decode", "q [12, 8, 64]", call, ", one scale, not causal")


def _with_and_without_lse(op: str, label: str, call: Arguments, formula: Any) -> Iterator[FormulaCase]:
    for return_lse in (False, True):
        yield FormulaCase(op, label, given(op, call), formula, {"return_lse": return_lse}, view=one_row)


def _rounded_pages(op: str, label: str, call: Arguments, form: str = "") -> FormulaCase:
    label += f", 2 KV heads, page size 16, int8{form}"
    return FormulaCase(op, label, given(op, call), _paged, {"return_lse": True}, view=one_row)


def _paged(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    causal: bool = True,
) -> Results:
    """Attention of each sequence's rows of q, equally many without cu_seqlens_q, over its seq_lens[b] tokens."""
    count = len(seq_lens)
    starts = range(0, len(q) + 1, len(q) // count) if cu_seqlens_q is None else cu_seqlens_q.tolist()
    held = [
        pages.to(q.dtype) * (scales.to(q)[..., None] if scales is not None else 1.0 if number is None else number)
        for pages, scales, number in ((k_pages, k_scales, k_scale), (v_pages, v_scales, v_scale))
    ]
    page, parts = k_pages.shape[2], []
    for b, length in enumerate(seq_lens.tolist()):
        k, v = (torch.stack([pages[page_table[b, at // page], :, at % page] for at in range(length)]) for pages in held)
        parts.append(oracle.attention(q[starts[b] : starts[b + 1]], k, v, 1 / math.sqrt(q.shape[-1]), causal))
    return _joined(parts)


def _joined(parts: Sequence[tuple[Tensor, Tensor]]) -> Results:
    outs, sums = zip(*parts, strict=True)
    return torch.cat(outs), torch.cat(sums)
