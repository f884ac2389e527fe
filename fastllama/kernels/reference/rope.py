"""Rotary position embedding, and the write of keys and values into their pages."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllama.kernels.reference.lookup import lookup
from fastllama.kernels.reference.numerics import wide
from fastllama.kernels.reference.quantize import quantize_by, quantize_heads


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first R dimensions of x [T, heads, D] by angles [T, 1, R/2]; the others pass through unchanged."""
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
    else:
        a, b = turned[..., :half], turned[..., half:]
    pair = (a * cos - b * sin, b * cos + a * sin)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def _rope(q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """`rope` before it rounds; NaN for a position outside of the cache."""
    cos, sin = lookup(cos_sin, positions)[:, None, :].chunk(2, dim=-1)
    return _rotate(wide(q), cos, sin, interleaved), _rotate(wide(k), cos, sin, interleaved)


def rope(q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """Rotate pairs (x_i, x_{i+R/2}), or interleaved (x_2i, x_2i+1), by positions * inv_freq_i, in at least fp32."""
    rotated_q, rotated_k = _rope(q, k, cos_sin, positions, interleaved)
    return rotated_q.to(q.dtype), rotated_k.to(k.dtype)


def rope_and_write_kv(
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    interleaved: bool = False,
) -> Tensor:
    """Split qkv, rotate q and k, write k and v into their pages at `slots`, return q [T, Hq, D].

    Writes as `write_kv` does, with k before it is rounded to qkv's dtype.
    """
    _, num_kv_heads, _, head_dim = k_pages.shape
    heads = qkv.unflatten(-1, (-1, head_dim))
    num_q_heads = heads.shape[1] - 2 * num_kv_heads
    q, k, v = heads.split((num_q_heads, num_kv_heads, num_kv_heads), dim=1)
    q, k = _rope(q, k, cos_sin, positions, interleaved)
    write_kv(k, v, slots, k_pages, v_pages, k_scales, v_scales)
    return q.to(qkv.dtype)


def write_kv(
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
) -> None:
    """Write k and v [T, Hkv, D] into their pages at `slots`.

    Nothing is written for a slot that is negative or past the last page. With scales [P, Hkv, page_size] the pages are
    quantized by `quantize_heads`, with one scale for all pages by `quantize_by`.
    """
    num_pages, _, page_size, _ = k_pages.shape
    kept = (slots >= 0) & (slots < num_pages * page_size)
    if not bool(kept.all()):
        slots, k, v = slots[kept], k[kept], v[kept]
    page, offset = slots // page_size, slots % page_size
    for pages, scales, scale, x in ((k_pages, k_scales, k_scale, k), (v_pages, v_scales, v_scale, v)):
        if scale is not None:
            codes = quantize_by(scale, wide(x), pages.dtype)
        elif scales is not None:
            codes, of_heads = quantize_heads(wide(x), pages.dtype)
            scales[page, :, offset] = of_heads.to(scales.dtype)
        else:
            codes = x.to(pages.dtype)
        if codes.element_size() == 1:  # as bytes: torch cannot index float8
            pages, codes = pages.view(torch.uint8), codes.view(torch.uint8)
        pages[page, :, offset] = codes
