"""Rotary embedding in Triton, in one launch: rope, and rope_and_write_kv from the fused projection to q and pages."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastllama.arithmetic import ceil_div, power_of_2
from fastllama.kernels.dispatch.checks import check_kernel_dtype
from fastllama.kernels.launch import tuning
from fastllama.kernels.launch.kernel_call import KernelCall, launcher
from fastllama.kernels.triton.overlap import follow, overlapping
from fastllama.kernels.triton.rows.heads import load_pairs, rotated, store_pairs
from fastllama.kernels.triton.rows.write_kv import e4m3_as_bytes, write_pairs


# Rotates the heads `head` [HEADS, 1] of one token, those below NUM_HEADS, from x to out.
@triton.jit
def rotate_heads(
    out_ptr,
    x_ptr,
    angles_ptr,
    exists,
    head,
    NUM_HEADS: tl.constexpr,
    OUT_HEAD_STRIDE: tl.constexpr,
    X_HEAD_STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    mask = head < NUM_HEADS  # [HEADS, 1]
    first, second = load_pairs(x_ptr, head * X_HEAD_STRIDE, mask, HEAD_DIM, ROTARY, PAIRS, INTERLEAVED)
    first, second = rotated(first, second, angles_ptr, exists, HEAD_DIM, ROTARY, PAIRS)
    dtype = out_ptr.dtype.element_ty
    first, second = first.to(dtype), second.to(dtype)
    store_pairs(out_ptr, head * OUT_HEAD_STRIDE, mask, first, second, HEAD_DIM, ROTARY, PAIRS, INTERLEAVED)


# Writes the heads `head` [HEADS, 1] of one token, those below NUM_HEADS, from x to its slot: `write_pairs`.
@triton.jit
def write_heads(
    pages_ptr,
    scales_ptr,
    x_ptr,
    angles_ptr,
    exists,
    head,
    slot,
    STRIDES: tl.constexpr,
    SCALE_STRIDES: tl.constexpr,
    ROTATE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    mask = head < NUM_HEADS  # [HEADS, 1]
    first, second = load_pairs(x_ptr, head * HEAD_DIM, mask, HEAD_DIM, ROTARY, PAIRS, INTERLEAVED)
    if ROTATE:
        first, second = rotated(first, second, angles_ptr, exists, HEAD_DIM, ROTARY, PAIRS)
    write_pairs(
        pages_ptr,
        scales_ptr,
        None,
        first,
        second,
        head,
        slot,
        STRIDES,
        SCALE_STRIDES,
        NUM_HEADS,
        PAGE_SIZE,
        HEAD_DIM,
        ROTARY,
        PAIRS,
        INTERLEAVED,
    )


# The row of the cos/sin cache for a position, and whether the position is in the cache.
@triton.jit
def find_angles(cos_sin_ptr, position_ptr, num_positions, stride):
    position = tl.load(position_ptr).to(tl.int64)
    return cos_sin_ptr + position * stride, (position >= 0) & (position < num_positions)


# One program owns HEADS heads of the queries, or of the keys, of one token.
@triton.jit(do_not_specialize=["positions_ptr", "num_positions"])
def rope_kernel(
    q_out_ptr,
    k_out_ptr,
    q_ptr,
    k_ptr,
    cos_sin_ptr,
    positions_ptr,
    num_positions,
    q_out_token_stride,
    k_out_token_stride,
    q_token_stride,
    k_token_stride,
    cos_sin_position_stride,
    Q_OUT_HEAD_STRIDE: tl.constexpr,
    K_OUT_HEAD_STRIDE: tl.constexpr,
    Q_HEAD_STRIDE: tl.constexpr,
    K_HEAD_STRIDE: tl.constexpr,
    NUM_Q_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    Q_BLOCKS: tl.constexpr = (NUM_Q_HEADS + HEADS - 1) // HEADS
    BLOCKS: tl.constexpr = Q_BLOCKS + (NUM_KV_HEADS + HEADS - 1) // HEADS
    token, block = (tl.program_id(0) // BLOCKS).to(tl.int64), tl.program_id(0) % BLOCKS
    head = tl.arange(0, HEADS)[:, None].to(tl.int64)  # [HEADS, 1]
    angles_ptr, exists = find_angles(cos_sin_ptr, positions_ptr + token, num_positions, cos_sin_position_stride)
    if block < Q_BLOCKS:
        rotate_heads(
            q_out_ptr + token * q_out_token_stride,
            q_ptr + token * q_token_stride,
            angles_ptr,
            exists,
            head + block * HEADS,
            NUM_Q_HEADS,
            Q_OUT_HEAD_STRIDE,
            Q_HEAD_STRIDE,
            HEAD_DIM,
            ROTARY,
            PAIRS,
            INTERLEAVED,
        )
    else:
        rotate_heads(
            k_out_ptr + token * k_out_token_stride,
            k_ptr + token * k_token_stride,
            angles_ptr,
            exists,
            head + (block - Q_BLOCKS) * HEADS,
            NUM_KV_HEADS,
            K_OUT_HEAD_STRIDE,
            K_HEAD_STRIDE,
            HEAD_DIM,
            ROTARY,
            PAIRS,
            INTERLEAVED,
        )


# One program owns HEADS heads of the queries, the keys or the values of one token.
@triton.jit(do_not_specialize=["positions_ptr", "slots_ptr", "num_positions", "num_slots"])
def rope_and_write_kv_kernel(
    q_out_ptr,
    k_pages_ptr,
    v_pages_ptr,
    k_scales_ptr,
    v_scales_ptr,
    qkv_ptr,
    cos_sin_ptr,
    positions_ptr,
    slots_ptr,
    num_positions,
    num_slots,
    q_out_token_stride,
    qkv_token_stride,
    cos_sin_position_stride,
    Q_OUT_HEAD_STRIDE: tl.constexpr,
    K_STRIDES: tl.constexpr,
    V_STRIDES: tl.constexpr,
    K_SCALE_STRIDES: tl.constexpr,
    V_SCALE_STRIDES: tl.constexpr,
    NUM_Q_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    Q_BLOCKS: tl.constexpr = (NUM_Q_HEADS + HEADS - 1) // HEADS
    KV_BLOCKS: tl.constexpr = (NUM_KV_HEADS + HEADS - 1) // HEADS
    BLOCKS: tl.constexpr = Q_BLOCKS + 2 * KV_BLOCKS
    token, block = (tl.program_id(0) // BLOCKS).to(tl.int64), tl.program_id(0) % BLOCKS
    head = tl.arange(0, HEADS)[:, None].to(tl.int64)  # [HEADS, 1]
    angles_ptr, exists = find_angles(cos_sin_ptr, positions_ptr + token, num_positions, cos_sin_position_stride)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    q_ptr = qkv_ptr + token * qkv_token_stride
    k_ptr = q_ptr + NUM_Q_HEADS * HEAD_DIM
    v_ptr = k_ptr + NUM_KV_HEADS * HEAD_DIM
    if block < Q_BLOCKS:
        rotate_heads(
            q_out_ptr + token * q_out_token_stride,
            q_ptr,
            angles_ptr,
            exists,
            head + block * HEADS,
            NUM_Q_HEADS,
            Q_OUT_HEAD_STRIDE,
            HEAD_DIM,
            HEAD_DIM,
            ROTARY,
            PAIRS,
            INTERLEAVED,
        )
    elif (slot >= 0) & (slot < num_slots):
        if block < Q_BLOCKS + KV_BLOCKS:
            write_heads(
                k_pages_ptr,
                k_scales_ptr,
                k_ptr,
                angles_ptr,
                exists,
                head + (block - Q_BLOCKS) * HEADS,
                slot,
                K_STRIDES,
                K_SCALE_STRIDES,
                True,
                NUM_KV_HEADS,
                PAGE_SIZE,
                HEAD_DIM,
                ROTARY,
                PAIRS,
                INTERLEAVED,
            )
        else:
            write_heads(
                v_pages_ptr,
                v_scales_ptr,
                v_ptr,
                angles_ptr,
                exists,
                head + (block - Q_BLOCKS - KV_BLOCKS) * HEADS,
                slot,
                V_STRIDES,
                V_SCALE_STRIDES,
                False,
                NUM_KV_HEADS,
                PAGE_SIZE,
                HEAD_DIM,
                ROTARY,
                PAIRS,
                INTERLEAVED,
            )


@launcher
def rope(
    q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor, interleaved: bool, q_out: Tensor, k_out: Tensor
) -> list[KernelCall]:
    """See kernels.rope."""
    check_kernel_dtype("q", q)
    tokens, num_q_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    heads = num_q_heads + num_kv_heads
    if not (tokens and heads and head_dim):
        return []
    launch = tuning.rope(q.device, rows=tokens, heads=heads, head_dim=head_dim, itemsize=q.element_size())
    group = launch.heads
    programs = ceil_div(num_q_heads, group) + ceil_div(num_kv_heads, group)  # of one token
    call = KernelCall(
        rope_kernel,
        (tokens * programs,),
        q_out_ptr=q_out,
        k_out_ptr=k_out,
        q_ptr=q,
        k_ptr=k,
        cos_sin_ptr=cos_sin,
        positions_ptr=positions,
        num_positions=cos_sin.shape[0],
        q_out_token_stride=q_out.stride(0),
        k_out_token_stride=k_out.stride(0),
        q_token_stride=q.stride(0),
        k_token_stride=k.stride(0),
        cos_sin_position_stride=cos_sin.stride(0),
        Q_OUT_HEAD_STRIDE=q_out.stride(1),
        K_OUT_HEAD_STRIDE=k_out.stride(1),
        Q_HEAD_STRIDE=q.stride(1),
        K_HEAD_STRIDE=k.stride(1),
        NUM_Q_HEADS=num_q_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        ROTARY=cos_sin.shape[1],
        INTERLEAVED=interleaved,
        HEADS=group,
        PAIRS=max(power_of_2(head_dim) // 2, 1),
        **overlapping(q.device),
        num_warps=launch.num_warps,
    )
    return [call]


@launcher
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
) -> list[KernelCall]:
    """See kernels.rope_and_write_kv."""
    check_kernel_dtype("qkv", qkv)
    tokens, num_q_heads, head_dim = q_out.shape
    if not tokens:
        return []
    _, num_kv_heads, page_size, _ = k_pages.shape
    k_pages, v_pages = e4m3_as_bytes(k_pages), e4m3_as_bytes(v_pages)
    heads = num_q_heads + 2 * num_kv_heads
    launch = tuning.rope(qkv.device, rows=tokens, heads=heads, head_dim=head_dim, itemsize=qkv.element_size())
    group = launch.heads
    programs = ceil_div(num_q_heads, group) + 2 * ceil_div(num_kv_heads, group)  # of one token
    call = KernelCall(
        rope_and_write_kv_kernel,
        (tokens * programs,),
        q_out_ptr=q_out,
        k_pages_ptr=k_pages,
        v_pages_ptr=v_pages,
        k_scales_ptr=k_scales,
        v_scales_ptr=v_scales,
        qkv_ptr=qkv,
        cos_sin_ptr=cos_sin,
        positions_ptr=positions,
        slots_ptr=slots,
        num_positions=cos_sin.shape[0],
        num_slots=k_pages.shape[0] * page_size,
        q_out_token_stride=q_out.stride(0),
        qkv_token_stride=qkv.stride(0),
        cos_sin_position_stride=cos_sin.stride(0),
        Q_OUT_HEAD_STRIDE=q_out.stride(1),
        K_STRIDES=k_pages.stride(),
        V_STRIDES=v_pages.stride(),
        K_SCALE_STRIDES=None if k_scales is None else k_scales.stride(),
        V_SCALE_STRIDES=None if v_scales is None else v_scales.stride(),
        NUM_Q_HEADS=num_q_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        ROTARY=cos_sin.shape[1],
        PAGE_SIZE=page_size,
        INTERLEAVED=interleaved,
        HEADS=group,
        PAIRS=max(power_of_2(head_dim) // 2, 1),
        **overlapping(qkv.device),
        num_warps=launch.num_warps,
    )
    return [call]
