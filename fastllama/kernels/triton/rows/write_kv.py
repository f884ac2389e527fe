"""Writes of keys and values into pages in Triton: heads in the registers of another kernel, and whole tensors."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllama.arithmetic import ceil_div, power_of_2
from fastllama.kernels.dispatch.checks import check_kernel_dtype
from fastllama.kernels.launch import tuning
from fastllama.kernels.launch.kernel_call import KernelCall, launcher
from fastllama.kernels.triton.overlap import follow, overlapping
from fastllama.kernels.triton.rows.heads import load_pairs, store_pairs
from fastllama.kernels.triton.rows.quantize import quantized, quantized_by


def e4m3_as_bytes(pages: Tensor) -> Tensor:
    """Pages of float8_e4m3fn viewed as bytes, because Triton rejects the dtype on sm_80; other pages unchanged."""
    return pages.view(torch.uint8) if pages.dtype == torch.float8_e4m3fn else pages


# Writes pairs [HEADS, PAIRS] in fp32 of the heads `head` [HEADS, 1] of one token, those below NUM_HEADS, to its slot.
# scale: that of all values of quantized pages, or None to compute each head's. Strides are of pages, heads and slots.
@triton.jit
def write_pairs(
    pages_ptr,
    scales_ptr,
    scale,
    first,
    second,
    head,
    slot,
    STRIDES: tl.constexpr,
    SCALE_STRIDES: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    mask = head < NUM_HEADS  # [HEADS, 1]
    dtype: tl.constexpr = pages_ptr.dtype.element_ty
    page, place = slot // PAGE_SIZE, slot % PAGE_SIZE
    if dtype.is_floating():
        first, second = first.to(dtype), second.to(dtype)
    elif scale is not None:
        first, second = quantized_by(scale, first, dtype), quantized_by(scale, second, dtype)
    else:
        first, second, scales = quantized(first, second, dtype)
        tl.store(scales_ptr + page * SCALE_STRIDES[0] + head * SCALE_STRIDES[1] + place, scales, mask=mask)
    start = page * STRIDES[0] + head * STRIDES[1] + place * STRIDES[2]  # [HEADS, 1]
    store_pairs(pages_ptr, start, mask, first, second, HEAD_DIM, ROTARY, PAIRS, INTERLEAVED)


# One program owns HEADS heads of the keys, or of the values, of one token. Pairs are the halves of a head.
@triton.jit(do_not_specialize=["slots_ptr", "num_slots"])
def write_kv_kernel(
    k_pages_ptr,
    v_pages_ptr,
    k_scales_ptr,
    v_scales_ptr,
    k_ptr,
    v_ptr,
    slots_ptr,
    k_scale,
    v_scale,
    num_slots,
    k_token_stride,
    v_token_stride,
    K_HEAD_STRIDE: tl.constexpr,
    V_HEAD_STRIDE: tl.constexpr,
    K_STRIDES: tl.constexpr,
    V_STRIDES: tl.constexpr,
    K_SCALE_STRIDES: tl.constexpr,
    V_SCALE_STRIDES: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    EVEN: tl.constexpr = HEAD_DIM // 2 * 2
    BLOCKS: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS  # of keys
    token, block = (tl.program_id(0) // (2 * BLOCKS)).to(tl.int64), tl.program_id(0) % (2 * BLOCKS)
    head = tl.arange(0, HEADS)[:, None].to(tl.int64) + block % BLOCKS * HEADS  # [HEADS, 1]
    mask = head < NUM_HEADS
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if (slot >= 0) & (slot < num_slots):
        if block < BLOCKS:
            first, second = load_pairs(
                k_ptr + token * k_token_stride, head * K_HEAD_STRIDE, mask, HEAD_DIM, EVEN, PAIRS, False
            )
            write_pairs(
                k_pages_ptr,
                k_scales_ptr,
                k_scale,
                first,
                second,
                head,
                slot,
                K_STRIDES,
                K_SCALE_STRIDES,
                NUM_HEADS,
                PAGE_SIZE,
                HEAD_DIM,
                EVEN,
                PAIRS,
                False,
            )
        else:
            first, second = load_pairs(
                v_ptr + token * v_token_stride, head * V_HEAD_STRIDE, mask, HEAD_DIM, EVEN, PAIRS, False
            )
            write_pairs(
                v_pages_ptr,
                v_scales_ptr,
                v_scale,
                first,
                second,
                head,
                slot,
                V_STRIDES,
                V_SCALE_STRIDES,
                NUM_HEADS,
                PAGE_SIZE,
                HEAD_DIM,
                EVEN,
                PAIRS,
                False,
            )


@launcher
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
) -> list[KernelCall]:
    """See kernels.write_kv."""
    check_kernel_dtype("k", k)
    tokens, num_heads, head_dim = k.shape
    if not tokens:
        return []
    page_size = k_pages.shape[2]
    k_pages, v_pages = e4m3_as_bytes(k_pages), e4m3_as_bytes(v_pages)
    launch = tuning.rope(k.device, rows=tokens, heads=2 * num_heads, head_dim=head_dim, itemsize=k.element_size())
    call = KernelCall(
        write_kv_kernel,
        (2 * tokens * ceil_div(num_heads, launch.heads),),
        k_pages_ptr=k_pages,
        v_pages_ptr=v_pages,
        k_scales_ptr=k_scales,
        v_scales_ptr=v_scales,
        k_ptr=k,
        v_ptr=v,
        slots_ptr=slots,
        k_scale=k_scale,
        v_scale=v_scale,
        num_slots=k_pages.shape[0] * page_size,
        k_token_stride=k.stride(0),
        v_token_stride=v.stride(0),
        K_HEAD_STRIDE=k.stride(1),
        V_HEAD_STRIDE=v.stride(1),
        K_STRIDES=k_pages.stride(),
        V_STRIDES=v_pages.stride(),
        K_SCALE_STRIDES=None if k_scales is None else k_scales.stride(),
        V_SCALE_STRIDES=None if v_scales is None else v_scales.stride(),
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        HEADS=launch.heads,
        PAIRS=max(power_of_2(head_dim) // 2, 1),
        **overlapping(k.device),
        num_warps=launch.num_warps,
    )
    return [call]
