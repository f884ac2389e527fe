"""Rotary position embedding, and the write of keys and values into their pages."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllama.kernels.reference.numerics import wide


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first R dimensions of x [T, heads, D] by angles [T, 1, R/2]; the others pass through."""
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
    else:
        a, b = turned[..., :half], turned[..., half:]
    pair = (a * cos - b * sin, b * cos + a * sin)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def rope(q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """Rotate pairs (x_i, x_{i+R/2}), or interleaved (x_2i, x_2i+1), by positions * inv_freq_i, in at least fp32."""
    cos, sin = cos_sin.index_select(0, positions)[:, None, :].chunk(2, dim=-1)
    rotated = (_rotate(wide(x), cos, sin, interleaved).to(x.dtype) for x in (q, k))
    return next(rotated), next(rotated)


def rope_and_write_kv(
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    interleaved: bool = False,
) -> Tensor:
    """Split qkv, rotate q and k, write k and v into their pages at `slots` (negative: nowhere), return q [T, Hq, D]."""
    _, num_kv_heads, page_size, head_dim = k_pages.shape
    heads = qkv.unflatten(-1, (-1, head_dim))
    num_q_heads = heads.shape[1] - 2 * num_kv_heads
    q, k, v = heads.split((num_q_heads, num_kv_heads, num_kv_heads), dim=1)
    q, k = rope(q, k, cos_sin, positions, interleaved)
    kept = slots >= 0
    if not bool(kept.all()):
        slots, k, v = slots[kept], k[kept], v[kept]
    page, offset = slots // page_size, slots % page_size
    k_pages[page, :, offset] = k
    v_pages[page, :, offset] = v
    return q
