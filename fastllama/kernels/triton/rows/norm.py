"""RMSNorm in Triton, alone or fused with a residual addition, quantization to int8 or both: one kernel, one pass."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastllama.arithmetic import ceil_div, power_of_2
from fastllama.kernels.dispatch.checks import as_rows, check_kernel_dtype
from fastllama.kernels.launch import tuning
from fastllama.kernels.launch.kernel_call import KernelCall, launcher
from fastllama.kernels.triton.overlap import follow, overlapping
from fastllama.kernels.triton.rows.quantize import as_scales, store_quantized


# One program owns ROWS rows. The weight is loaded before the sum needs it, so that both latencies overlap.
@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_kernel(
    out_ptr,
    residual_out_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    scales_out_ptr,
    out_row_stride,
    residual_out_row_stride,
    x_row_stride,
    residual_row_stride,
    num_rows,
    eps,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]  # [ROWS, 1]
    col = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    mask = (row < num_rows) & (col < SIZE)  # [ROWS, BLOCK]
    dtype = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * x_row_stride + col, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + row * residual_row_stride + col, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + col, mask=col < SIZE, other=0.0).to(tl.float32)  # [1, BLOCK]
    if HAS_RESIDUAL:
        total = x.to(dtype)
        tl.store(residual_out_ptr + row * residual_out_row_stride + col, total, mask=mask)
        x = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / SIZE + eps)[:, None]  # [ROWS, 1]
    normed = (x * scale).to(dtype).to(tl.float32)  # the cast before the weight is Hugging Face's
    result = (normed * weight).to(dtype)
    if scales_out_ptr is None:
        tl.store(out_ptr + row * out_row_stride + col, result, mask=mask)
    else:
        out_ptrs = out_ptr + row * out_row_stride + col
        result = tl.where(mask, result.to(tl.float32), 0.0)  # past SIZE it is 0 * scale, NaN where a row's scale is inf
        store_quantized(out_ptrs, scales_out_ptr + row, result, mask, row < num_rows)


def rows_per_program(block: int, num_warps: int) -> int:
    """Rows of `block` elements that give each thread 16 of them: two 128-bit accesses of a 16-bit dtype."""
    return max(16 * 32 * num_warps // block, 1)


@launcher
def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> list[KernelCall]:
    """See kernels.rms_norm."""
    check_kernel_dtype("x", x)
    return _plan(as_rows("x", x), None, weight, eps, as_rows("out", out), None, None)


@launcher
def rms_norm_int8(x: Tensor, weight: Tensor, eps: float, out: Tensor, scales_out: Tensor) -> list[KernelCall]:
    """See kernels.rms_norm_int8."""
    check_kernel_dtype("x", x)
    return _plan(as_rows("x", x), None, weight, eps, as_rows("out", out), None, scales_out)


@launcher
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor, residual_out: Tensor
) -> list[KernelCall]:
    """See kernels.add_rms_norm."""
    check_kernel_dtype("x", x)
    x, residual = as_rows("x", x), as_rows("residual", residual)
    return _plan(x, residual, weight, eps, as_rows("out", out), as_rows("residual_out", residual_out), None)


@launcher
def add_rms_norm_int8(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor, scales_out: Tensor
) -> list[KernelCall]:
    """See kernels.add_rms_norm_int8."""
    check_kernel_dtype("x", x)
    x, total = as_rows("x", x), as_rows("residual", residual)
    return _plan(x, total, weight, eps, as_rows("out", out), total, scales_out)


def _plan(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    out: Tensor,
    residual_out: Tensor | None,
    scales_out: Tensor | None,
) -> list[KernelCall]:
    num_rows, size = x.shape
    if not (num_rows and size):
        return []
    launch = tuning.norm(x.device, size=size, itemsize=x.element_size())
    block = power_of_2(size)
    rows = rows_per_program(block, launch.num_warps)
    call = KernelCall(
        rms_norm_kernel,
        (ceil_div(num_rows, rows),),
        out_ptr=out,
        residual_out_ptr=residual_out,
        x_ptr=x,
        residual_ptr=residual,
        weight_ptr=weight,
        scales_out_ptr=None if scales_out is None else as_scales("scales_out", scales_out),
        out_row_stride=out.stride(0),
        residual_out_row_stride=0 if residual_out is None else residual_out.stride(0),
        x_row_stride=x.stride(0),
        residual_row_stride=0 if residual is None else residual.stride(0),
        num_rows=num_rows,
        eps=eps,
        SIZE=size,
        ROWS=rows,
        BLOCK=block,
        HAS_RESIDUAL=residual is not None,
        **overlapping(x.device),
        num_warps=launch.num_warps,
    )
    return [call]
