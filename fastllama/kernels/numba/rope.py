"""Rotation of q and k out of the fused projection, and the write of k and v into their pages, in one pass.

One thread: a token of a 1.1B model takes 2 us, its layer's products a hundred times that.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from fastllama.kernels import reference
from fastllama.kernels.numba.numerics import INTEGER_LIKE, LIKE, jit, load, load_integer, store


@jit
def rotate(x_ptr, out_ptr, cos_sin_ptr, x_start, out_start, angles_start, head_dim, rotary_dim, interleaved, like):
    """One head of head_dim elements from each start on; dimensions past rotary_dim pass through."""
    half = rotary_dim // 2
    step = 2 if interleaved else 1
    apart = 1 if interleaved else half
    for i in range(half):
        a, b = load(x_ptr, x_start + i * step, like), load(x_ptr, x_start + i * step + apart, like)
        cos = load(cos_sin_ptr, angles_start + i, np.float32(0))
        sin = load(cos_sin_ptr, angles_start + half + i, np.float32(0))
        store(out_ptr, out_start + i * step, a * cos - b * sin, like)
        store(out_ptr, out_start + i * step + apart, b * cos + a * sin, like)
    for i in range(rotary_dim, head_dim):
        store(out_ptr, out_start + i, load(x_ptr, x_start + i, like), like)


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
    for token in range(tokens):
        position = load_integer(positions_ptr, token, position_like)
        if not 0 <= position < num_positions or load_integer(slots_ptr, token, slot_like) >= num_pages * page_size:
            return token
    shape = (head_dim, rotary_dim, interleaved, like)
    for token in range(tokens):
        angles = load_integer(positions_ptr, token, position_like) * cos_sin_position_stride
        first = token * qkv_token_stride
        for head in range(num_q_heads):
            to = token * q_out_token_stride + head * q_out_head_stride
            rotate(qkv_ptr, q_out_ptr, cos_sin_ptr, first + head * head_dim, to, angles, *shape)
        slot = load_integer(slots_ptr, token, slot_like)
        if slot < 0:
            continue
        page, offset = slot // page_size, slot % page_size
        for head in range(num_kv_heads):
            k = first + (num_q_heads + head) * head_dim
            to = page * k_strides[0] + head * k_strides[1] + offset * k_strides[2]
            rotate(qkv_ptr, k_pages_ptr, cos_sin_ptr, k, to, angles, *shape)
            v = k + num_kv_heads * head_dim
            to = page * v_strides[0] + head * v_strides[1] + offset * v_strides[2]
            for i in range(head_dim):
                store(v_pages_ptr, to + i, load(qkv_ptr, v + i, like), like)
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
