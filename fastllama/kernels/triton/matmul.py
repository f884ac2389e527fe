"""matmul in Triton for the few rows of a decode step, where all the time goes into reading the weight; torch's beyond.

The weight is the left operand, so that its rows fill tensor cores however few x has. Its columns are split over
programs as its shape alone decides: a row's numbers are added in one order, whatever else is in the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllama.kernels import tuning
from fastllama.kernels.checks import as_rows, check_kernel_dtype
from fastllama.kernels.op import Function
from fastllama.kernels.triton.launching import KernelCall, launcher, scratch
from fastllama.kernels.triton.parts import sum_of

MOST_ROWS = 64  # of the kernel: a tile of as many is as large as the weight's, and the vendor's products take over


# One program owns BLOCK_N features of all rows, over SPLIT columns of the weight. Rows and features past the last are
# the last again, and are not stored.
@triton.jit
def matmul_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    num_rows,
    x_row_stride,
    weight_row_stride,
    out_row_stride,
    out_split_stride,
    FEATURES: tl.constexpr,
    SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    feature = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    row = tl.arange(0, BLOCK_M)  # [M]
    split = tl.program_id(1)
    col = tl.arange(0, BLOCK_K)  # [K]
    x_ptrs = x_ptr + tl.minimum(row, num_rows - 1).to(tl.int64)[:, None] * x_row_stride + col[None, :]
    weight_rows = tl.minimum(feature, FEATURES - 1).to(tl.int64)[:, None] * weight_row_stride
    weight_ptrs = weight_ptr + weight_rows + col[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    first = split * SPLIT
    for start in tl.range(first, tl.minimum(first + SPLIT, SIZE), BLOCK_K, num_stages=STAGES):
        if SIZE % BLOCK_K == 0:
            weight = tl.load(weight_ptrs + start)  # [N, K]
            x = tl.load(x_ptrs + start)  # [M, K]
        else:
            inside = (start + col < SIZE)[None, :]
            weight = tl.load(weight_ptrs + start, mask=inside, other=0.0)
            x = tl.load(x_ptrs + start, mask=inside, other=0.0)
        acc = tl.dot(weight, tl.trans(x), acc, input_precision="ieee")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + tl.minimum(feature, FEATURES - 1)).to(tl.float32)[:, None]
    out_ptrs = out_ptr + split * out_split_stride + row.to(tl.int64)[None, :] * out_row_stride + feature[:, None]
    mask = (feature < FEATURES)[:, None] & (row < num_rows)[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, workspace: Tensor | None) -> Function | None:
    """See kernels.matmul."""
    check_kernel_dtype("x", x)
    rows, result = as_rows("x", x), as_rows("out", out)
    if rows.shape[0] <= MOST_ROWS:
        again: Function | None = _of_few_rows(x, weight, bias, out, workspace)
        return again
    torch.mm(rows, weight.T, out=result)
    if bias is not None:
        result += bias
    return None


@launcher
def _of_few_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, workspace: Tensor | None
) -> list[KernelCall]:
    x, out = as_rows("x", x), as_rows("out", out)
    num_rows, features = out.shape
    launch, split, splits, size = _plan(num_rows, weight)
    workspace = scratch(workspace, size, torch.float32, x.device)
    if not (num_rows and features):
        return []
    parts = out if splits == 1 else workspace[:size].view(splits, num_rows, features)
    product = KernelCall(
        matmul_kernel,
        (tuning.ceil_div(features, launch.features), splits),
        out_ptr=parts,
        x_ptr=x,
        weight_ptr=weight,
        bias_ptr=bias if splits == 1 else None,
        num_rows=num_rows,
        x_row_stride=x.stride(0),
        weight_row_stride=weight.stride(0),
        out_row_stride=parts.stride(-2),
        out_split_stride=num_rows * features,
        FEATURES=features,
        SIZE=weight.shape[1],
        SPLIT=split,
        BLOCK_M=max(tuning.power_of_2(num_rows), 16),
        BLOCK_N=launch.features,
        BLOCK_K=launch.size,
        STAGES=launch.stages,
        num_warps=launch.num_warps,
    )
    if splits == 1:
        return [product]
    return [product, sum_of(parts, bias, out)]


def _plan(num_rows: int, weight: Tensor) -> tuple[tuning.MatmulLaunch, int, int, int]:
    """The launch, the columns of a split, the splits, and the workspace's elements."""
    features, size = weight.shape
    launch = tuning.matmul(weight.device, features=features, size=size, itemsize=weight.element_size())
    blocks = max(tuning.ceil_div(size, launch.size), 1)
    each = tuning.ceil_div(blocks, launch.splits)
    splits = tuning.ceil_div(blocks, each)
    return launch, each * launch.size, splits, splits * num_rows * features if splits > 1 else 0


def workspace_size(num_rows: int, weight: Tensor) -> int:
    """Elements of fp32 that `matmul` needs for so many rows: a product of each split of the columns."""
    return _plan(num_rows, weight)[3] if num_rows <= MOST_ROWS else 0
