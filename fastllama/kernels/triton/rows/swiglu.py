"""silu_mul in Triton: silu(gate) * up of one packed projection or of two tensors, in one pass over memory."""

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


# One program owns BLOCK columns of one row, all columns if it quantizes; programs of one row are adjacent, as its
# memory is. Without an up_ptr, up follows the gate in its row.
@triton.jit
def silu_mul_kernel(
    out_ptr,
    gate_up_ptr,
    up_ptr,
    scales_out_ptr,
    out_row_stride,
    gate_up_row_stride,
    up_row_stride,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    BLOCKS: tl.constexpr = tl.cdiv(SIZE, BLOCK)
    row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    col = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = col < SIZE
    gate_ptrs = gate_up_ptr + row * gate_up_row_stride + col
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    up_ptrs = gate_ptrs + SIZE if up_ptr is None else up_ptr + row * up_row_stride + col
    up = tl.load(up_ptrs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    product = gate / (1.0 + tl.exp(-gate)) * up
    product = product.to(gate_up_ptr.dtype.element_ty)
    out_ptrs = out_ptr + row * out_row_stride + col
    if scales_out_ptr is None:
        tl.store(out_ptrs, product, mask=mask)
    else:
        one = tl.arange(0, 1)
        store_quantized(out_ptrs, scales_out_ptr + row + one, product.to(tl.float32), mask, one < 1)


@launcher
def silu_mul(gate_up: Tensor, up: Tensor | None, out: Tensor) -> list[KernelCall]:
    """See kernels.silu_mul."""
    check_kernel_dtype("gate_up", gate_up)
    gate_up, out = as_rows("gate_up", gate_up), as_rows("out", out)
    up = None if up is None else as_rows("up", up)
    rows, size = out.shape
    if not (rows and size):
        return []
    launch = tuning.swiglu(out.device, rows=rows, size=size, itemsize=out.element_size())
    call = KernelCall(
        silu_mul_kernel,
        (rows * ceil_div(size, launch.block),),
        out_ptr=out,
        gate_up_ptr=gate_up,
        up_ptr=up,
        scales_out_ptr=None,
        out_row_stride=out.stride(0),
        gate_up_row_stride=gate_up.stride(0),
        up_row_stride=0 if up is None else up.stride(0),
        SIZE=size,
        BLOCK=launch.block,
        **overlapping(out.device),
        num_warps=launch.num_warps,
    )
    return [call]


@launcher
def silu_mul_int8(gate_up: Tensor, out: Tensor, scales_out: Tensor) -> list[KernelCall]:
    """See kernels.silu_mul_int8."""
    check_kernel_dtype("gate_up", gate_up)
    gate_up, out = as_rows("gate_up", gate_up), as_rows("out", out)
    rows, size = out.shape
    if not rows:
        return []
    call = KernelCall(
        silu_mul_kernel,
        (rows,),
        out_ptr=out,
        gate_up_ptr=gate_up,
        up_ptr=None,
        scales_out_ptr=as_scales("scales_out", scales_out),
        out_row_stride=out.stride(0),
        gate_up_row_stride=gate_up.stride(0),
        up_row_stride=0,
        SIZE=size,
        BLOCK=power_of_2(size),
        **overlapping(out.device),
        num_warps=tuning.norm(out.device, size=size, itemsize=gate_up.element_size()).num_warps,
    )
    return [call]
