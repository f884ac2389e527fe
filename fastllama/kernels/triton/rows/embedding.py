"""embedding in Triton: rows of a table by token id."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastllama.arithmetic import ceil_div
from fastllama.kernels.dispatch.checks import check_kernel_dtype
from fastllama.kernels.launch.kernel_call import KernelCall, launcher
from fastllama.kernels.triton.overlap import follow, overlapping

BLOCK = 1024  # elements: 128 threads take 16 bytes of a 16-bit dtype each


# One program owns BLOCK elements of one row. An id outside the table gives NaN, and reads nothing.
@triton.jit(do_not_specialize=["ids_ptr", "num_rows"])
def embedding_kernel(
    out_ptr,
    ids_ptr,
    weight_ptr,
    num_rows,
    out_row_stride,
    weight_row_stride,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    row = tl.load(ids_ptr + token).to(tl.int64)
    exists = (row >= 0) & (row < num_rows)
    values = tl.load(weight_ptr + row * weight_row_stride + col, mask=exists & (col < SIZE), other=float("nan"))
    tl.store(out_ptr + token * out_row_stride + col, values, mask=col < SIZE)


@launcher
def embedding(ids: Tensor, weight: Tensor, out: Tensor) -> list[KernelCall]:
    """See kernels.embedding."""
    check_kernel_dtype("weight", weight)
    tokens, size = out.shape
    if not (tokens and size):
        return []
    call = KernelCall(
        embedding_kernel,
        (tokens, ceil_div(size, BLOCK)),
        out_ptr=out,
        ids_ptr=ids,
        weight_ptr=weight,
        num_rows=weight.shape[0],
        out_row_stride=out.stride(0),
        weight_row_stride=weight.stride(0),
        SIZE=size,
        BLOCK=BLOCK,
        **overlapping(out.device),
        num_warps=4,
    )
    return [call]
