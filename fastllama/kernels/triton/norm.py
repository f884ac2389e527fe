"""RMSNorm in Triton, with or without a residual addition in front: one kernel, one pass over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


# One program owns one row.
@triton.jit
def norm_kernel(
    out_ptr,
    residual_out_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_row_stride,
    residual_out_row_stride,
    x_row_stride,
    residual_row_stride,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)  # [BLOCK]
    mask = cols < SIZE
    dtype = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * x_row_stride + cols, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + row * residual_row_stride + cols, mask=mask, other=0.0).to(tl.float32)
        total = x.to(dtype)
        tl.store(residual_out_ptr + row * residual_out_row_stride + cols, total, mask=mask)
        x = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)
    normed = (x * scale).to(dtype).to(tl.float32)  # the cast before the weight is Hugging Face's
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_row_stride + cols, (normed * weight).to(dtype), mask=mask)


def num_warps(size: int) -> int:
    """Warps for a row of `size` elements: 8 to 32 elements for a thread, so that a row stays in registers in 128-bit accesses."""
    return min(max(triton.next_power_of_2(size) // 512, 1), 16)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """See kernels.rms_norm."""
    _launch(x, None, weight, eps, out, None)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor, residual_out: Tensor) -> None:
    """See kernels.add_rms_norm."""
    _launch(x, residual, weight, eps, out, residual_out)


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor, residual_out: Tensor | None
) -> None:
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"x has dtype {x.dtype}; legal for the Triton kernel: float32, float16, bfloat16")
    size = x.shape[-1]
    # view, not reshape: rows that do not lie at one stride are refused, never copied behind the caller's back.
    rows = [None if tensor is None else tensor.view(-1, size) for tensor in (out, residual_out, x, residual)]
    if x.numel() == 0:
        return
    norm_kernel[(rows[2].shape[0],)](
        out_ptr=rows[0],
        residual_out_ptr=rows[1],
        x_ptr=rows[2],
        residual_ptr=rows[3],
        weight_ptr=weight,
        out_row_stride=rows[0].stride(0),
        residual_out_row_stride=0 if rows[1] is None else rows[1].stride(0),
        x_row_stride=rows[2].stride(0),
        residual_row_stride=0 if rows[3] is None else rows[3].stride(0),
        eps=eps,
        SIZE=size,
        BLOCK=triton.next_power_of_2(size),
        HAS_RESIDUAL=residual is not None,
        num_warps=num_warps(size),
    )
