"""Calls of attention: packed prompts, and prefill and decode over a paged cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastllama.catalogue.maker import Arguments, Maker
from fastllama.catalogue.rotary import PAGE
from fastllama.kernels import attention_workspace


def attention_varlen(
    m: Maker,
    queries: Sequence[int],
    keys: Sequence[int],
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    causal: bool = True,
) -> Arguments:
    """queries, keys: numbers per sequence."""
    k, v = (m.normal(sum(keys), kv_heads, head_dim) for _ in "kv")
    q = m.normal(sum(queries), heads, head_dim)
    bounds = {"cu_seqlens_q": _bounds(m, queries), "cu_seqlens_k": _bounds(m, keys)}
    return {"q": q, "k": k, "v": v, **bounds, **_result(m, q, causal)}


def attention_prefill(
    m: Maker,
    lengths: Sequence[int],
    queries: Sequence[int],
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    held: Arguments | None = None,
    causal: bool = True,
    **cache: Any,
) -> Arguments:
    """lengths: cached tokens of each sequence; the last ones are its queries.

    held: an existing result of `paged`. cache: options of `paged`.
    """
    q = m.normal(sum(queries), heads, head_dim)
    held = held or paged(m, lengths, kv_heads, head_dim, **cache)
    return {"q": q, **held, "cu_seqlens_q": _bounds(m, queries), **_result(m, q, causal)}


def attention_decode(
    m: Maker,
    lengths: Sequence[int],
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    queries: int = 1,
    held: Arguments | None = None,
    causal: bool = True,
    **cache: Any,
) -> Arguments:
    """queries: per sequence, its last tokens. held, cache: as for `attention_prefill`."""
    q = m.normal(queries * len(lengths), heads, head_dim)
    call = {"q": q, **(held or paged(m, lengths, kv_heads, head_dim, **cache)), **_result(m, q, causal)}
    return call | {"workspace": m.workspace(attention_workspace, q, call["k_pages"], call["page_table"])}


def paged(
    m: Maker,
    lengths: Sequence[int],
    kv_heads: int,
    head_dim: int,
    *,
    page: int = PAGE,
    pages: int | None = None,
    width: int | None = None,
    pages_dtype: torch.dtype | None = None,
) -> Arguments:
    """Pages in random order, page table and sequence lengths. Unused slots hold NaN, as uninitialised memory may.

    page: page size in tokens. pages: number of pages; width: of the table; as needed where None. pages_dtype: of
    quantized pages, which have scales.
    """
    counts = [-(-length // page) for length in lengths]
    shape = (sum(counts) if pages is None else pages, kv_heads, page, head_dim)
    ids, used = m.some_of(shape[0], shape[0]), 0
    table = torch.zeros(
        len(lengths), max(counts, default=0) if width is None else width, dtype=torch.int32, device=m.device
    )
    held = [m.fresh(*shape, dtype=pages_dtype) for _ in "kv"]
    scales = [None if pages_dtype is None else m.fresh(*shape[:3], dtype=torch.float32) for _ in "kv"]
    for sequence, (length, count) in enumerate(zip(lengths, () if m.is_meta else counts, strict=False)):
        own, used = ids[used : used + count], used + count
        table[sequence, :count] = own
        full, rest = divmod(length, page)
        if full:
            _write(held, scales, (own[:full],), m.normal(full, 2, kv_heads, page, head_dim).unbind(1))
        if rest:
            _write(held, scales, (own[full], slice(None), slice(rest)), m.normal(2, kv_heads, rest, head_dim).unbind())
    return {
        "k_pages": held[0],
        "v_pages": held[1],
        "page_table": table,
        "seq_lens": m.tensor(lengths, torch.int32),
        "k_scales": scales[0],
        "v_scales": scales[1],
        "k_scale": None,
        "v_scale": None,
    }


def _write(
    held: Sequence[Tensor], scales: Sequence[Tensor | None], at: tuple[Any, ...], values: Sequence[Tensor]
) -> None:
    """Write keys and values to slots, rounded to 8 bits where there are scales."""
    for pages, its_scales, each in zip(held, scales, values, strict=True):
        if its_scales is None:
            pages[at] = each
        else:
            pages[at] = (42 * each.double()).round().clamp(-127, 127).to(pages.dtype)
            its_scales[at] = (each[..., 0].abs().double() / 64 + 2**-8).float()


def _bounds(m: Maker, lengths: Sequence[int]) -> Tensor:
    return m.tensor([0, *lengths], torch.int32).cumsum(0, dtype=torch.int32)


def _result(m: Maker, q: Tensor, causal: bool) -> Arguments:
    return {"scale": 1.0 / math.sqrt(q.shape[-1]), "causal": causal, "base2": False, "out": m.fresh(*q.shape)}
