"""Rotation of q and k out of the fused projection, and the write of k and v into their pages, in one pass.

One thread: a token of a 1.1B model takes 2 us, its layer's products a hundred times that.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from fastllama.kernels import reference
from fastllama.kernels.numba.numerics import INTEGER_LIKE, LIKE, jit, narrow, vector, widen


@jit
def rotate(x, out, angles, interleaved, like):
    """One head: x, out [D]; angles [R], cosines then sines; dimensions past R pass through."""
    half = angles.shape[0] // 2
    step = 2 if interleaved else 1
    apart = 1 if interleaved else half
    for i in range(half):
        a, b = widen(x[i * step]), widen(x[i * step + apart])
        out[i * step] = narrow(a * angles[i] - b * angles[half + i], like)
        out[i * step + apart] = narrow(b * angles[i] + a * angles[half + i], like)
    for i in range(2 * half, x.shape[0]):
        out[i] = x[i]


# Strides count elements. Returns the first token whose position or slot does not exist, having written nothing, or -1.
@jit
def rope_and_write_kv_kernel(
    qkv_ptr,
    cos_sin_ptr,
    positions_ptr,
    slots_ptr,
    k_pages_ptr,
    v_pages_ptr,
    q_out_ptr,
    qkv_token_stride,
    cos_sin_position_stride,
    k_strides,
    v_strides,
    q_out_token_stride,
    q_out_head_stride,
    tokens,
    num_positions,
    rotary_dim,
    num_pages,
    num_kv_heads,
    page_size,
    head_dim,
    num_q_heads,
    interleaved,
    like,
    position_like,
    slot_like,
):
    positions = vector(positions_ptr, 0, tokens, position_like)
    slots = vector(slots_ptr, 0, tokens, slot_like)
    for token in range(tokens):
        if not 0 <= positions[token] < num_positions or slots[token] >= num_pages * page_size:
            return token
    for token in range(tokens):
        angles = vector(cos_sin_ptr, positions[token] * cos_sin_position_stride, rotary_dim, np.float32(0))
        first = token * qkv_token_stride
        for head in range(num_q_heads):
            x = vector(qkv_ptr, first + head * head_dim, head_dim, like)
            at = token * q_out_token_stride + head * q_out_head_stride
            rotate(x, vector(q_out_ptr, at, head_dim, like), angles, interleaved, like)
        if slots[token] < 0:
            continue
        page, offset = slots[token] // page_size, slots[token] % page_size
        for head in range(num_kv_heads):
            k = vector(qkv_ptr, first + (num_q_heads + head) * head_dim, head_dim, like)
            at = page * k_strides[0] + head * k_strides[1] + offset * k_strides[2]
            rotate(k, vector(k_pages_ptr, at, head_dim, like), angles, interleaved, like)
            v = vector(qkv_ptr, first + (num_q_heads + num_kv_heads + head) * head_dim, head_dim, like)
            at = page * v_strides[0] + head * v_strides[1] + offset * v_strides[2]
            v_out = vector(v_pages_ptr, at, head_dim, like)
            for i in range(head_dim):
                v_out[i] = v[i]
    return -1


def rope_and_write_kv(
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    interleaved: bool,
    q_out: Tensor,
) -> None:
    """See kernels.rope_and_write_kv. Raises ValueError for a position or slot that does not exist, writing nothing."""
    like = LIKE.get(qkv.dtype)
    if like is None:
        q_out.copy_(reference.rope_and_write_kv(qkv, cos_sin, positions, slots, k_pages, v_pages, interleaved))
        return
    num_pages, num_kv_heads, page_size, head_dim = k_pages.shape
    tokens, num_q_heads, _ = q_out.shape
    num_positions, rotary_dim = cos_sin.shape
    illegal = rope_and_write_kv_kernel(
        qkv.data_ptr(),
        cos_sin.data_ptr(),
        positions.data_ptr(),
        slots.data_ptr(),
        k_pages.data_ptr(),
        v_pages.data_ptr(),
        q_out.data_ptr(),
        qkv.stride(0),
        cos_sin.stride(0),
        k_pages.stride(),
        v_pages.stride(),
        q_out.stride(0),
        q_out.stride(1),
        tokens,
        num_positions,
        rotary_dim,
        num_pages,
        num_kv_heads,
        page_size,
        head_dim,
        num_q_heads,
        interleaved,
        like,
        INTEGER_LIKE[positions.dtype],
        INTEGER_LIKE[slots.dtype],
    )
    if illegal >= 0:
        raise ValueError(
            f"token {illegal} has position {int(positions[illegal])} and slot {int(slots[illegal])}; legal: positions "
            f"from 0 to {num_positions - 1}, slots below {num_pages * page_size}"
        )
