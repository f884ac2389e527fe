"""rope_and_write_kv, from the fused projection to q and the pages of k and v in one pass, and write_kv.

One thread: a token of a 1.1B model takes 2 us, its layer's matmuls a hundred times that.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastllama.kernels import reference
from fastllama.kernels.numba.numerics import CODE_LIKE, INTEGER_LIKE, LIKE, as_written, jit, load, load_integer, store
from fastllama.kernels.reference.quantize import LARGEST_CODE, SMALLEST_ABSMAX

# float8_e4m3fn has its NaN where 480 would be.
NAN_AS = {torch.int8: 0.0, torch.float8_e4m3fn: 480.0}


@jit
def rotate(
    x_ptr,
    out_ptr,
    cos_sin_ptr,
    x_start,
    out_start,
    angles_start,
    one,
    out_like,
    head_dim,
    rotary_dim,
    interleaved,
    like,
    angle_like,
):
    """Rotate one head of head_dim elements from each start on; dimensions past rotary_dim pass through.

    one: 1, or NaN for a position outside the cos/sin cache.
    """
    half = rotary_dim // 2
    step = 2 if interleaved else 1
    apart = 1 if interleaved else half
    for i in range(half):
        a, b = load(x_ptr, x_start + i * step, like), load(x_ptr, x_start + i * step + apart, like)
        cos = load(cos_sin_ptr, angles_start + i, angle_like) * one
        sin = load(cos_sin_ptr, angles_start + half + i, angle_like)
        store(out_ptr, out_start + i * step, a * cos - b * sin, out_like)
        store(out_ptr, out_start + i * step + apart, b * cos + a * sin, out_like)
    for i in range(rotary_dim, head_dim):
        store(out_ptr, out_start + i, load(x_ptr, x_start + i, like), out_like)


# Not reassociated: x * largest may overflow where x * (largest / absmax) does not.
@as_written
def quantize(x_ptr, codes_ptr, scales_ptr, x_start, codes_start, scale_at, size, largest, like, code_like):
    """Quantize one head, and store its scale; see reference.quantize_heads."""
    absmax = np.float32(SMALLEST_ABSMAX)
    for i in range(size):
        x = abs(load(x_ptr, x_start + i, like))
        if x > absmax or x != x:  # a NaN stays
            absmax = x
    finite, inverse = absmax < np.float32(np.inf), largest / absmax
    for i in range(size):
        scaled = load(x_ptr, x_start + i, like) * inverse if finite else np.float32(0)
        store(codes_ptr, codes_start + i, scaled, code_like)
    store(scales_ptr, scale_at, absmax / largest, np.float32(0))


@as_written
def quantize_by(scale, x_ptr, codes_ptr, x_start, codes_start, size, largest, nan, like, code_like):
    """Quantize one head under a given scale; see reference.quantize_by. nan: the number to encode for a NaN."""
    for i in range(size):
        quotient = load(x_ptr, x_start + i, like) / scale
        within = min(max(quotient, -largest), largest)
        store(codes_ptr, codes_start + i, within if quotient == quotient else nan, code_like)


# Strides count elements. scratch_ptr: head_dim fp32 if pages are quantized, else 0. A position outside the cos/sin
# cache gives NaN; a slot outside the pool is not written.
@jit
def rope_and_write_kv_kernel(
    qkv_ptr,
    cos_sin_ptr,
    positions_ptr,
    slots_ptr,
    k_pages_ptr,
    v_pages_ptr,
    k_scales_ptr,
    v_scales_ptr,
    scratch_ptr,
    q_out_ptr,
    qkv_token_stride,
    cos_sin_position_stride,
    k_strides,
    v_strides,
    k_scale_strides,
    v_scale_strides,
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
    largest,
    like,
    page_like,
    angle_like,
    position_like,
    slot_like,
):
    for token in range(tokens):
        position = load_integer(positions_ptr, token, position_like)
        exists = 0 <= position < num_positions
        one = np.float32(1) if exists else np.float32(np.nan)
        angles = position * cos_sin_position_stride if exists else 0
        first = token * qkv_token_stride
        for head in range(num_q_heads):
            to = token * q_out_token_stride + head * q_out_head_stride
            x = first + head * head_dim
            rotate(
                qkv_ptr,
                q_out_ptr,
                cos_sin_ptr,
                x,
                to,
                angles,
                one,
                like,
                head_dim,
                rotary_dim,
                interleaved,
                like,
                angle_like,
            )
        slot = load_integer(slots_ptr, token, slot_like)
        if not 0 <= slot < num_pages * page_size:
            continue
        page, offset = slot // page_size, slot % page_size
        for head in range(2 * num_kv_heads):
            x = first + (num_q_heads + head) * head_dim
            is_key = head < num_kv_heads
            turned = rotary_dim if is_key else 0
            pages_ptr, scales_ptr = (k_pages_ptr, k_scales_ptr) if is_key else (v_pages_ptr, v_scales_ptr)
            strides, scale_strides = (k_strides, k_scale_strides) if is_key else (v_strides, v_scale_strides)
            kv_head = head if is_key else head - num_kv_heads
            to = page * strides[0] + kv_head * strides[1] + offset * strides[2]
            if scratch_ptr:
                rotate(
                    qkv_ptr,
                    scratch_ptr,
                    cos_sin_ptr,
                    x,
                    0,
                    angles,
                    one,
                    np.float32(0),
                    head_dim,
                    turned,
                    interleaved,
                    like,
                    angle_like,
                )
                scale_at = page * scale_strides[0] + kv_head * scale_strides[1] + offset
                full = np.float32(0)
                quantize(scratch_ptr, pages_ptr, scales_ptr, 0, to, scale_at, head_dim, largest, full, page_like)
            else:
                rotate(
                    qkv_ptr,
                    pages_ptr,
                    cos_sin_ptr,
                    x,
                    to,
                    angles,
                    one,
                    page_like,
                    head_dim,
                    turned,
                    interleaved,
                    like,
                    angle_like,
                )


# Strides count elements. k_scale, v_scale: the scale of all keys, or values; 0 for none.
@jit
def write_kv_kernel(
    k_ptr,
    v_ptr,
    slots_ptr,
    k_pages_ptr,
    v_pages_ptr,
    k_scales_ptr,
    v_scales_ptr,
    k_strides,
    v_strides,
    k_page_strides,
    v_page_strides,
    k_scale_strides,
    v_scale_strides,
    tokens,
    num_pages,
    num_kv_heads,
    page_size,
    head_dim,
    k_scale,
    v_scale,
    largest,
    nan,
    like,
    page_like,
    slot_like,
):
    for token in range(tokens):
        slot = load_integer(slots_ptr, token, slot_like)
        if not 0 <= slot < num_pages * page_size:
            continue
        page, offset = slot // page_size, slot % page_size
        for head in range(2 * num_kv_heads):
            is_key = head < num_kv_heads
            kv_head = head if is_key else head - num_kv_heads
            x_ptr, strides = (k_ptr, k_strides) if is_key else (v_ptr, v_strides)
            pages_ptr, page_strides = (k_pages_ptr, k_page_strides) if is_key else (v_pages_ptr, v_page_strides)
            scales_ptr, scale_strides = (k_scales_ptr, k_scale_strides) if is_key else (v_scales_ptr, v_scale_strides)
            scale = k_scale if is_key else v_scale
            x = token * strides[0] + kv_head * strides[1]
            to = page * page_strides[0] + kv_head * page_strides[1] + offset * page_strides[2]
            if scales_ptr:
                scale_at = page * scale_strides[0] + kv_head * scale_strides[1] + offset
                quantize(x_ptr, pages_ptr, scales_ptr, x, to, scale_at, head_dim, largest, like, page_like)
            elif scale:
                quantize_by(scale, x_ptr, pages_ptr, x, to, head_dim, largest, nan, like, page_like)
            else:
                for i in range(head_dim):
                    store(pages_ptr, to + i, load(x_ptr, x + i, like), page_like)


def rope_and_write_kv(
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    interleaved: bool,
    q_out: Tensor,
) -> None:
    """See kernels.rope_and_write_kv."""
    like = LIKE.get(qkv.dtype)
    if like is None:
        q_out.copy_(
            reference.rope_and_write_kv(
                qkv, cos_sin, positions, slots, k_pages, v_pages, k_scales, v_scales, interleaved
            )
        )
        return
    num_pages, num_kv_heads, page_size, head_dim = k_pages.shape
    tokens, num_q_heads, _ = q_out.shape
    num_positions, rotary_dim = cos_sin.shape
    if not num_positions:  # so that there is a row to read for positions outside the cache
        cos_sin = cos_sin.new_zeros(1, rotary_dim)
    scales = (0, 0, 0)
    scale_strides: tuple[tuple[int, ...], ...] = ((0, 0, 0), (0, 0, 0))
    page_like, largest = like, np.float32(0)
    if k_scales is not None and v_scales is not None:
        scratch = torch.empty(head_dim, dtype=torch.float32, device=qkv.device)
        scales = (k_scales.data_ptr(), v_scales.data_ptr(), scratch.data_ptr())
        scale_strides = (k_scales.stride(), v_scales.stride())
        page_like, largest = CODE_LIKE[k_pages.dtype], np.float32(LARGEST_CODE[k_pages.dtype])
    rope_and_write_kv_kernel(
        qkv.data_ptr(),
        cos_sin.data_ptr(),
        positions.data_ptr(),
        slots.data_ptr(),
        k_pages.data_ptr(),
        v_pages.data_ptr(),
        *scales,
        q_out.data_ptr(),
        qkv.stride(0),
        cos_sin.stride(0),
        k_pages.stride(),
        v_pages.stride(),
        *scale_strides,
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
        largest,
        like,
        page_like,
        LIKE[cos_sin.dtype],
        INTEGER_LIKE[positions.dtype],
        INTEGER_LIKE[slots.dtype],
    )


def write_kv(
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    k_scale: float | None,
    v_scale: float | None,
) -> None:
    """See kernels.write_kv."""
    like = LIKE.get(k.dtype)
    if like is None:
        reference.write_kv(k, v, slots, k_pages, v_pages, k_scales, v_scales, k_scale, v_scale)
        return
    num_pages, num_kv_heads, page_size, head_dim = k_pages.shape
    scales = (0, 0)
    scale_strides: tuple[tuple[int, ...], ...] = ((0, 0, 0), (0, 0, 0))
    if k_scales is not None and v_scales is not None:
        scales, scale_strides = (k_scales.data_ptr(), v_scales.data_ptr()), (k_scales.stride(), v_scales.stride())
    write_kv_kernel(
        k.data_ptr(),
        v.data_ptr(),
        slots.data_ptr(),
        k_pages.data_ptr(),
        v_pages.data_ptr(),
        *scales,
        k.stride(),
        v.stride(),
        k_pages.stride(),
        v_pages.stride(),
        *scale_strides,
        k.shape[0],
        num_pages,
        num_kv_heads,
        page_size,
        head_dim,
        np.float32(k_scale or 0),
        np.float32(v_scale or 0),
        np.float32(LARGEST_CODE.get(k_pages.dtype, 0)),
        np.float32(NAN_AS.get(k_pages.dtype, 0)),
        like,
        CODE_LIKE.get(k_pages.dtype, like),
        INTEGER_LIKE[slots.dtype],
    )
