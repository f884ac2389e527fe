"""The sum of products whose columns were split over programs, in one order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastllama.kernels import tuning
from fastllama.kernels.triton.launching import KernelCall

BLOCK = 256


# One program owns BLOCK features of one row, and adds the parts in order.
@triton.jit
def sum_kernel(
    out_ptr,
    parts_ptr,
    bias_ptr,
    out_row_stride,
    part_stride,
    FEATURES: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = feature < FEATURES
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts_ptr + part * part_stride + row * FEATURES + feature, mask=mask, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + feature, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_row_stride + feature, total.to(out_ptr.dtype.element_ty), mask=mask)


def sum_of(parts: Tensor, bias: Tensor | None, out: Tensor) -> KernelCall:
    """out [M, N] = the sum of parts [P, M, N] fp32, contiguous, and bias [N], rounded once."""
    count, num_rows, features = parts.shape
    return KernelCall(
        sum_kernel,
        (num_rows, tuning.ceil_div(features, BLOCK)),
        out_ptr=out,
        parts_ptr=parts,
        bias_ptr=bias,
        out_row_stride=out.stride(0),
        part_stride=num_rows * features,
        FEATURES=features,
        PARTS=count,
        BLOCK=BLOCK,
        num_warps=1,
    )
