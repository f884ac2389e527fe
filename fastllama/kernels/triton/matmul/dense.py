"""matmul in Triton for the few rows of a decode step, which are bound by reading the weight; torch's beyond.

The weight is the left operand, so that its rows fill tensor cores however few x has. Split-K depends on the weight's
shape alone, so results are batch-invariant.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from fastllama.arithmetic import ceil_div, power_of_2
from fastllama.kernels.dispatch.checks import as_rows, check_kernel_dtype
from fastllama.kernels.dispatch.fusion import Fusion
from fastllama.kernels.launch import heuristics, tuning
from fastllama.kernels.launch.kernel_call import KernelCall, VendorMatmul, launcher
from fastllama.kernels.triton.matmul.epilogue import (
    Splits,
    arguments,
    fuses_norm,
    owned,
    reduce_and_store,
    row_sums,
    splits_of,
    squares_of,
    weighted,
)
from fastllama.kernels.triton.overlap import prefetch, release, wait

MOST_ROWS = 64  # of the kernel: their tile is as large as the weight's; with more, the vendor's matmul runs


def few_rows(x: Tensor, weight: Tensor) -> int:
    """The most rows of x that the kernel takes."""
    return MOST_ROWS


# One program owns BLOCK_N features of all rows, over SPLIT columns of the weight. Rows and features past the last
# repeat the last, and are not stored.
@triton.jit(do_not_specialize=["num_rows"])
def matmul_dense_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    norm_ptr,
    residual_ptr,
    counters_ptr,
    parts_ptr,
    squares_ptr,
    num_rows,
    eps,
    x_row_stride,
    weight_row_stride,
    out_row_stride,
    residual_row_stride,
    FEATURES: tl.constexpr,
    SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    feature = owned(FEATURES, BLOCK_N, GATED)  # [N]
    row = tl.arange(0, BLOCK_M).to(tl.int64)  # [M]
    first = tl.program_id(1) * SPLIT
    col = tl.arange(0, BLOCK_K)  # [K]
    x_offsets = tl.minimum(row, num_rows - 1)[:, None] * x_row_stride + (first + col)[None, :]
    weight_offsets = feature[:, None] * weight_row_stride + (first + col)[None, :]
    ahead = tl.minimum(first + tl.arange(0, 8) * (BLOCK_K // 2), SIZE - 1)  # a tile of 256 bytes is two lines wide
    release(PDL)
    prefetch(weight_ptr + feature[:, None] * weight_row_stride + ahead[None, :], PDL)
    wait(PDL)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    squares = tl.zeros([BLOCK_M, BLOCK_K // 8], tl.float32)
    for start in tl.range(first, tl.minimum(first + SPLIT, SIZE), BLOCK_K, num_stages=STAGES):
        exists = start + col < SIZE
        if SIZE % BLOCK_K == 0:
            weight = tl.load(weight_ptr + weight_offsets)  # [N, K]
            x = tl.load(x_ptr + x_offsets)  # [M, K]
        else:
            weight = tl.load(weight_ptr + weight_offsets, mask=exists[None, :], other=0.0)
            x = tl.load(x_ptr + x_offsets, mask=exists[None, :], other=0.0)
        # Two addresses advance from tile to tile. Computed from `start` in each tile, they take a third more
        # instructions, and ptxas serializes those of tensor cores (C7515).
        weight_ptr += BLOCK_K
        x_ptr += BLOCK_K
        if norm_ptr is not None:
            squares += squares_of(x)
            x = weighted(x, norm_ptr, start + col, exists)
        acc = tl.dot(weight, tl.trans(x), acc, input_precision="ieee")
    reduce_and_store(
        acc,
        row_sums(squares),
        row,
        num_rows,
        out_ptr,
        bias_ptr,
        norm_ptr,
        residual_ptr,
        counters_ptr,
        parts_ptr,
        squares_ptr,
        eps,
        out_row_stride,
        residual_row_stride,
        FEATURES,
        SIZE,
        SPLITS,
        GATED,
    )


def fuses(x: Tensor, weight: Tensor, bias: Tensor | None, fusion: Fusion) -> Fusion:
    """The part of a Fusion that the kernel computes: none for many rows, which run in torch."""
    if math.prod(x.shape[:-1]) > MOST_ROWS:
        return Fusion()
    return fusion if fusion.norm is None or fuses_norm(x) else fusion._replace(norm=None)


@launcher
def matmul(
    x: Tensor, weight: Tensor, bias: Tensor | None, fusion: Fusion, out: Tensor, workspace: Tensor | None
) -> list[KernelCall | VendorMatmul]:
    """See kernels.matmul; `fusion` is what `fuses` returned."""
    check_kernel_dtype("x", x)
    x, out = as_rows("x", x), as_rows("out", out)
    num_rows, (features, size) = x.shape[0], weight.shape
    if num_rows > MOST_ROWS:
        assert fusion.is_empty, "see `fuses`"
        return [VendorMatmul(x, weight, bias, out)]
    launch, splits = _plan(num_rows, weight)
    if not out.numel():
        return []
    block_m = max(power_of_2(num_rows), 16)
    fused = fusion.norm is not None or fusion.residual is not None
    wide = 2 if block_m == 64 and fused else 1  # 64 rows of x in registers spill on sm_80
    call = KernelCall(
        matmul_dense_kernel,
        (ceil_div(out.shape[1], launch.features // (2 if fusion.gated else 1)), splits.count),
        **arguments(features, splits, bias, fusion, out, workspace),
        x_ptr=x,
        weight_ptr=weight,
        x_row_stride=x.stride(0),
        weight_row_stride=weight.stride(0),
        SIZE=size,
        BLOCK_M=block_m,
        BLOCK_N=launch.features,
        BLOCK_K=launch.size,
        STAGES=launch.stages,
        num_warps=wide * launch.num_warps,
    )
    return [call]


def _plan(num_rows: int, weight: Tensor) -> tuple[heuristics.MatmulLaunch, Splits]:
    features, size = weight.shape
    launch = tuning.matmul(weight.device, features=features, size=size, itemsize=weight.element_size())
    tiles = ceil_div(features, launch.features) + 1  # one more where the halves of a gated weight are tiled separately
    return launch, splits_of(num_rows, size, launch.size, tiles, launch.features, launch.splits)


def workspace_size(num_rows: int, weight: Tensor) -> int:
    """Elements of fp32 that `matmul` needs for up to `num_rows` rows: the partial sums of each split."""
    return _plan(min(num_rows, MOST_ROWS), weight)[1].elements
