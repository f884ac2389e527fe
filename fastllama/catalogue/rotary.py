"""Calls of the rotary embedding and of the KV write into pages, alone and fused."""

from __future__ import annotations

import torch

from fastllama.catalogue.maker import Arguments, Maker
from fastllama.kernels import cos_sin_cache

POSITIONS = 4096
PAGE = 64  # tokens
HELD = 7  # initial content of a page; exact in every dtype


def rope(
    m: Maker,
    rows: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    positions: int = POSITIONS,
    rotated: int | None = None,
    angles: torch.dtype = torch.float32,
    interleaved: bool = False,
    fused: bool = False,
) -> Arguments:
    """rotated: rotated dimensions of a head, all where None. angles: the dtype of cosines and sines.

    fused: in place in a fused projection of queries, keys and values.
    """
    if fused:
        qkv = m.normal(rows, heads + 2 * kv_heads, head_dim)
        q, k, _ = qkv.split((heads, kv_heads, kv_heads), dim=1)
        outputs = {"q_out": q, "k_out": k}
    else:
        q, k = (m.normal(rows, count, head_dim) for count in (heads, kv_heads))
        outputs = {"q_out": m.fresh(*q.shape), "k_out": m.fresh(*k.shape)}
    turns = _turns(m, rows, positions, rotated or head_dim)
    turns["cos_sin"] = turns["cos_sin"].to(angles)
    return {"q": q, "k": k, **turns, "interleaved": interleaved, **outputs}


def rope_and_write_kv(
    m: Maker,
    rows: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    page: int = PAGE,
    pages: int | None = None,
    positions: int = POSITIONS,
    padding: int | None = None,
    pages_dtype: torch.dtype | None = None,
) -> Arguments:
    """page, pages, padding, pages_dtype: as for `write_kv`."""
    return {
        "qkv": m.normal(rows, (heads + 2 * kv_heads) * head_dim),
        **_turns(m, rows, positions, head_dim),
        **_places(m, rows, kv_heads, head_dim, page, pages, padding, pages_dtype),
        "interleaved": False,
        "q_out": m.fresh(rows, heads, head_dim),
    }


def write_kv(
    m: Maker,
    rows: int,
    kv_heads: int,
    head_dim: int,
    *,
    page: int = PAGE,
    pages: int | None = None,
    padding: int | None = None,
    pages_dtype: torch.dtype | None = None,
    scale: float | None = None,
) -> Arguments:
    """pages: number of pages, enough for the rows where None. padding: every padding-th row has no slot.

    pages_dtype: of quantized pages. scale: one fixed scale for their values, instead of computed ones.
    """
    call = {
        "k": m.normal(rows, kv_heads, head_dim),
        "v": m.normal(rows, kv_heads, head_dim),
        **_places(m, rows, kv_heads, head_dim, page, pages, padding, pages_dtype),
        "k_scale": scale,
        "v_scale": scale,
    }
    return call if scale is None else call | {"k_scales": None, "v_scales": None}


def _places(
    m: Maker,
    rows: int,
    kv_heads: int,
    head_dim: int,
    page: int,
    pages: int | None,
    padding: int | None,
    pages_dtype: torch.dtype | None,
) -> Arguments:
    """Slots, and the pages with their scales."""
    count = max(-(-rows // page), 1) if pages is None else pages
    call: Arguments = {"slots": m.some_of(count * page, rows)}
    if padding is not None:
        call["slots"][1::padding] = -1
    shape = (count, kv_heads, page, head_dim)
    for side in "kv":
        call[f"{side}_pages"] = torch.full(shape, HELD, dtype=pages_dtype or m.dtype, device=m.device)
        call[f"{side}_scales"] = None if pages_dtype is None else m.fresh(*shape[:3], dtype=torch.float32)
    return call


def _turns(m: Maker, rows: int, positions: int, rotated: int) -> Arguments:
    """The cos/sin cache, and each row's position."""
    frequencies = 10000.0 ** -(torch.arange(0, rotated, 2, dtype=torch.float32, device=m.device) / rotated)
    return {"cos_sin": cos_sin_cache(frequencies, positions), "positions": m.some_of(positions, rows)}
