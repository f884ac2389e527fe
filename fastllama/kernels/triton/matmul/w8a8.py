"""matmul_w8a8 in Triton: int8 by int8 on the tensor cores, for few rows and for many.

The weight is the left operand, loaded to registers in the order in which it is packed (kernels/reference/int8.py), and
out is computed transposed. Sums are exact in int32, so that tiles and splits of K may depend on the number of rows, and
results are still batch-invariant.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllama.arithmetic import ceil_div
from fastllama.kernels.dispatch.checks import as_rows, check_kernel_dtype
from fastllama.kernels.launch import heuristics, tuning
from fastllama.kernels.launch.kernel_call import KernelCall, launcher, scratch
from fastllama.kernels.reference.int4 import COLUMNS
from fastllama.kernels.triton.overlap import follow, overlapping, prefetch, release, wait
from fastllama.kernels.triton.rows.quantize import as_scales

FEATURES = 128  # of a program: two tiles of the layout
TOGETHER = 16  # row tiles whose programs are adjacent: they share tiles of the weight, and x stays in L2
BLOCK = 256  # features of a program that reduces the splits


# Quantized values [128, BLOCK_K] int8 from row `row`, a multiple of 64, and column `start`. Row tiles past the last
# repeat the last.
@triton.jit
def load_left(packed_ptr, row_stride, row, start, N: tl.constexpr, BLOCK_K: tl.constexpr):
    QUARTERS: tl.constexpr = BLOCK_K // 32
    lane = tl.arange(0, 256)[:, None, None]
    quarter, byte = tl.arange(0, QUARTERS)[None, :, None], tl.arange(0, 16)[None, None, :]
    tile = tl.minimum(row // 64 + lane // 128, (N - 1) // 64)
    packed_ptr += start // 32 * 2048
    codes = tl.load(packed_ptr + tile * row_stride + (quarter * 2048 + lane % 128 * 16 + byte))
    codes = codes.reshape(8, 8, 4, QUARTERS, 2, 2, 4)  # w, g, q, quarter, c, r, i
    return codes.trans(0, 5, 1, 3, 4, 2, 6).reshape(128, BLOCK_K)


# Addresses of the 128-byte lines of the first 512 columns from `begin` on, of the tiles that `load_left` takes.
@triton.jit
def lines(packed_ptr, row_stride, row, begin, N: tl.constexpr, K: tl.constexpr):
    line = tl.arange(0, 512)
    tile = tl.minimum(row // 64 + line // 256, (N - 1) // 64)
    byte = tl.minimum(begin // 32 * 2048 + line % 256 * 128, tl.cdiv(K, 128) * 8192 - 1)
    return packed_ptr + tile * row_stride + byte


# Dequantized sums in fp32; x_scale and scale broadcast. Bit-identical in both kernels: no operation is left that a
# compiler could contract.
@triton.jit
def scaled(sums, x_scale, scale, bias_ptrs, mask):
    y = sums.to(tl.float32) * x_scale
    if bias_ptrs is not None:
        bias = tl.load(bias_ptrs, mask=mask, other=0.0).to(tl.float32)
    return y * scale if bias_ptrs is None else tl.fma(y, scale, bias)


# One program owns 128 features and BLOCK_M rows of out, of one split of K. With several splits it stores sums.
@triton.jit(do_not_specialize=["num_rows"])
def matmul_w8a8_kernel(
    x_ptr,
    x_scales_ptr,
    packed_ptr,
    scales_ptr,
    bias_ptr,
    out_ptr,
    x_row_stride,
    packed_row_stride,
    out_row_stride,
    num_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    TOGETHER: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    TILES: tl.constexpr = (N + 127) // 128
    place, split = tl.program_id(0), tl.program_id(1)
    first_tile = place // (TOGETHER * TILES) * TOGETHER
    together = tl.minimum(tl.cdiv(num_rows, BLOCK_M) - first_tile, TOGETHER)
    place %= TOGETHER * TILES
    first = (place // together).to(tl.int64) * 128
    row = (first_tile + place % together).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    col = first + tl.arange(0, 128)  # [N]
    some, inside = row < num_rows, col < N
    x_ptrs = x_ptr + tl.minimum(row, num_rows - 1)[:, None] * x_row_stride
    acc = tl.zeros([128, BLOCK_M], tl.int32)
    begin = split * SPLIT
    if BLOCK_M <= 64:  # more rows are bound by arithmetic
        prefetch(lines(packed_ptr, packed_row_stride, first, begin, N, K), PDL)
    wait(PDL)
    for start in tl.range(begin, tl.minimum(begin + SPLIT, K), BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(x_ptrs + k) if K % BLOCK_K == 0 else tl.load(x_ptrs + k, mask=k < K, other=0)  # [M, K]
        codes = load_left(packed_ptr, packed_row_stride, first, start, N, BLOCK_K)
        acc = tl.dot(codes, tl.trans(x), acc, out_dtype=tl.int32)
    mask = inside[:, None] & some[None, :]
    out_ptrs = out_ptr + (split.to(tl.int64) * num_rows + row)[None, :] * out_row_stride + col[:, None]
    if scales_ptr is None:
        tl.store(out_ptrs, acc, mask=mask)
    else:
        x_scale = tl.load(x_scales_ptr + row, mask=some, other=0.0)[None, :]
        scale = tl.load(scales_ptr + col, mask=inside, other=0.0).to(tl.float32)[:, None]
        bias_ptrs = None if bias_ptr is None else bias_ptr + col[:, None]
        y = scaled(acc, x_scale, scale, bias_ptrs, inside[:, None])
        tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)


# Reduces the splits: one program owns BLOCK features of one row.
@triton.jit(do_not_specialize=["num_rows"])
def matmul_w8a8_sum_kernel(
    out_ptr,
    parts_ptr,
    x_scales_ptr,
    scales_ptr,
    bias_ptr,
    out_row_stride,
    num_rows,
    N: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = col < N
    total = tl.zeros([BLOCK], tl.int32)
    part_ptrs = parts_ptr + row * N + col  # of [PARTS, rows, N]
    for _ in tl.static_range(PARTS):
        total += tl.load(part_ptrs, mask=mask, other=0)
        part_ptrs += num_rows.to(tl.int64) * N
    scale = tl.load(scales_ptr + col, mask=mask, other=0.0).to(tl.float32)
    bias_ptrs = None if bias_ptr is None else bias_ptr + col
    y = scaled(total, tl.load(x_scales_ptr + row), scale, bias_ptrs, mask)
    tl.store(out_ptr + row * out_row_stride + col, y.to(out_ptr.dtype.element_ty), mask=mask)


def _plan(x: Tensor, scales: Tensor) -> tuple[heuristics.W8A8Launch, int, int, int]:
    """The launch, the columns of a split, the number of splits, and the elements of the workspace."""
    num_rows, size, features = math.prod(x.shape[:-1]), x.shape[-1], scales.shape[0]
    launch = tuning.w8a8(x.device, rows=num_rows, features=features, size=size)
    tiles = ceil_div(size, COLUMNS)
    split = ceil_div(tiles, launch.splits)
    splits = ceil_div(tiles, split)
    return launch, split * COLUMNS, splits, splits * num_rows * features if splits > 1 else 0


def workspace_size(x: Tensor, packed: Tensor, scales: Tensor) -> int:
    """Elements of int32 that `matmul_w8a8` needs: the sums of each split."""
    return _plan(x, scales)[3]


@launcher
def matmul_w8a8(
    x: Tensor,
    x_scales: Tensor,
    packed: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    out: Tensor,
    workspace: Tensor | None,
) -> list[KernelCall]:
    """See kernels.matmul_w8a8."""
    check_kernel_dtype("x_scales", x_scales)
    check_kernel_dtype("scales", scales)
    launch, split, splits, elements = _plan(x, scales)
    workspace = scratch(workspace, elements, torch.int32, x.device)
    x, x_scales, out = as_rows("x", x), as_scales("x_scales", x_scales), as_rows("out", out)
    (num_rows, size), features = x.shape, scales.shape[0]
    if not (num_rows and features):
        return []
    parts = out[None] if splits == 1 else workspace[:elements].view(splits, num_rows, features)
    whole = splits == 1
    product = KernelCall(
        matmul_w8a8_kernel,
        (ceil_div(num_rows, launch.rows) * ceil_div(features, FEATURES), splits),
        x_ptr=x,
        x_scales_ptr=x_scales if whole else None,
        packed_ptr=packed,
        scales_ptr=scales if whole else None,
        bias_ptr=bias if whole else None,
        out_ptr=parts,
        x_row_stride=x.stride(0),
        packed_row_stride=packed.stride(0),
        out_row_stride=parts.stride(1),
        num_rows=num_rows,
        N=features,
        K=size,
        SPLIT=split,
        BLOCK_M=launch.rows,
        BLOCK_K=launch.columns,
        STAGES=launch.stages,
        TOGETHER=TOGETHER,
        **overlapping(x.device),
        num_warps=launch.num_warps,
    )
    if whole:
        return [product]
    added = KernelCall(
        matmul_w8a8_sum_kernel,
        (num_rows, ceil_div(features, BLOCK)),
        out_ptr=out,
        parts_ptr=parts,
        x_scales_ptr=x_scales,
        scales_ptr=scales,
        bias_ptr=bias,
        out_row_stride=out.stride(0),
        num_rows=num_rows,
        N=features,
        PARTS=splits,
        BLOCK=BLOCK,
        **overlapping(x.device),
        num_warps=1,
    )
    return [product, added]
