"""merge_state in Triton: two attention results over disjoint keys merged, in one pass over memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastllama.arithmetic import ceil_div, power_of_2
from fastllama.kernels.dispatch.checks import check_kernel_dtype
from fastllama.kernels.launch.kernel_call import KernelCall, launcher

TILE_BYTES = 1024  # of each operand: two 128-bit accesses for each thread of one warp


# One program owns HEADS heads of one token.
@triton.jit
def merge_state_kernel(
    out_ptr,
    lse_out_ptr,
    a_ptr,
    a_lse_ptr,
    b_ptr,
    b_lse_ptr,
    out_token_stride,
    lse_out_token_stride,
    lse_out_head_stride,
    a_token_stride,
    a_lse_token_stride,
    a_lse_head_stride,
    b_token_stride,
    b_lse_token_stride,
    b_lse_head_stride,
    OUT_HEAD_STRIDE: tl.constexpr,
    A_HEAD_STRIDE: tl.constexpr,
    B_HEAD_STRIDE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BASE2: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    BLOCKS: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    token, block = (tl.program_id(0) // BLOCKS).to(tl.int64), tl.program_id(0) % BLOCKS
    head = (block * HEADS + tl.arange(0, HEADS))[:, None].to(tl.int64)  # [HEADS, 1]
    used = head < NUM_HEADS
    a_lse_ptrs = a_lse_ptr + token * a_lse_token_stride + head * a_lse_head_stride
    b_lse_ptrs = b_lse_ptr + token * b_lse_token_stride + head * b_lse_head_stride
    a_lse = tl.load(a_lse_ptrs, mask=used, other=float("-inf"))
    b_lse = tl.load(b_lse_ptrs, mask=used, other=float("-inf"))
    a_lse = tl.where(a_lse == float("inf"), float("-inf"), a_lse)
    b_lse = tl.where(b_lse == float("inf"), float("-inf"), b_lse)
    dim = tl.arange(0, BLOCK_D)[None, :]  # [1, D]
    mask = used & (dim < HEAD_DIM)  # [HEADS, D]
    a = tl.load(a_ptr + token * a_token_stride + head * A_HEAD_STRIDE + dim, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + token * b_token_stride + head * B_HEAD_STRIDE + dim, mask=mask, other=0.0).to(tl.float32)

    peak = tl.maximum(a_lse, b_lse)  # [HEADS, 1]
    base = tl.where(peak == float("-inf"), 0.0, peak)
    if BASE2:
        a_weight, b_weight = tl.exp2(a_lse - base), tl.exp2(b_lse - base)
    else:
        a_weight, b_weight = tl.exp(a_lse - base), tl.exp(b_lse - base)
    total = a_weight + b_weight
    lse = peak + (tl.log2(total) if BASE2 else tl.log(total))
    merged = a * tl.div_rn(a_weight, total) + b * tl.div_rn(b_weight, total)  # [HEADS, D]
    # Selected, not multiplied by 0 and 1: the result without keys may hold anything, and -0 + 0 is not -0.
    no_a, no_b = a_lse == float("-inf"), b_lse == float("-inf")
    merged = tl.where(no_a, tl.where(no_b, 0.0, b), tl.where(no_b, a, merged))
    out_ptrs = out_ptr + token * out_token_stride + head * OUT_HEAD_STRIDE + dim
    tl.store(out_ptrs, merged.to(out_ptr.dtype.element_ty), mask=mask)
    lse_out_ptrs = lse_out_ptr + token * lse_out_token_stride + head * lse_out_head_stride
    tl.store(lse_out_ptrs, lse, mask=used)


@launcher
def merge_state(
    a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor, base2: bool, out: Tensor, lse_out: Tensor
) -> list[KernelCall]:
    """See kernels.merge_state."""
    check_kernel_dtype("a", a)
    tokens, num_heads, head_dim = a.shape
    if not (tokens and num_heads):
        return []
    block_d = power_of_2(head_dim)
    heads = min(max(TILE_BYTES // (block_d * a.element_size()), 1), power_of_2(num_heads))
    call = KernelCall(
        merge_state_kernel,
        (tokens * ceil_div(num_heads, heads),),
        out_ptr=out,
        lse_out_ptr=lse_out,
        a_ptr=a,
        a_lse_ptr=a_lse,
        b_ptr=b,
        b_lse_ptr=b_lse,
        out_token_stride=out.stride(0),
        lse_out_token_stride=lse_out.stride(0),
        lse_out_head_stride=lse_out.stride(1),
        a_token_stride=a.stride(0),
        a_lse_token_stride=a_lse.stride(0),
        a_lse_head_stride=a_lse.stride(1),
        b_token_stride=b.stride(0),
        b_lse_token_stride=b_lse.stride(0),
        b_lse_head_stride=b_lse.stride(1),
        OUT_HEAD_STRIDE=out.stride(1),
        A_HEAD_STRIDE=a.stride(1),
        B_HEAD_STRIDE=b.stride(1),
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        BASE2=bool(base2),
        HEADS=heads,
        BLOCK_D=block_d,
        # One warp: where lse_out is a_lse, a second could read a_lse after the first has overwritten it.
        num_warps=1,
    )
    return [call]
