"""quantize_rows in Triton: one pass over memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastllama.arithmetic import ceil_div, power_of_2
from fastllama.kernels.dispatch.checks import as_rows, check_kernel_dtype
from fastllama.kernels.launch import tuning
from fastllama.kernels.launch.kernel_call import KernelCall, launcher
from fastllama.kernels.triton.overlap import follow, overlapping
from fastllama.kernels.triton.rows.norm import rows_per_program
from fastllama.kernels.triton.rows.quantize import as_scales, store_quantized


# One program owns ROWS rows.
@triton.jit(do_not_specialize=["num_rows"])
def quantize_rows_kernel(
    out_ptr,
    scales_out_ptr,
    x_ptr,
    out_row_stride,
    x_row_stride,
    num_rows,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]  # [ROWS, 1]
    col = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    mask = (row < num_rows) & (col < SIZE)
    x = tl.load(x_ptr + row * x_row_stride + col, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    store_quantized(out_ptr + row * out_row_stride + col, scales_out_ptr + row, x, mask, row < num_rows)


@launcher
def quantize_rows(x: Tensor, out: Tensor, scales_out: Tensor) -> list[KernelCall]:
    """See kernels.quantize_rows."""
    check_kernel_dtype("x", x)
    x, out = as_rows("x", x), as_rows("out", out)
    num_rows, size = x.shape
    if not num_rows:
        return []
    launch = tuning.norm(x.device, size=size, itemsize=x.element_size())
    block = power_of_2(size)
    rows = rows_per_program(block, launch.num_warps)
    call = KernelCall(
        quantize_rows_kernel,
        (ceil_div(num_rows, rows),),
        out_ptr=out,
        scales_out_ptr=as_scales("scales_out", scales_out),
        x_ptr=x,
        out_row_stride=out.stride(0),
        x_row_stride=x.stride(0),
        num_rows=num_rows,
        SIZE=size,
        ROWS=rows,
        BLOCK=block,
        **overlapping(x.device),
        num_warps=launch.num_warps,
    )
    return [call]
