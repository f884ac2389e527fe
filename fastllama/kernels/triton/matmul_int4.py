"""matmul_int4 in Triton: for few rows a product with codes, for many the dequantized weight and torch's product.

Few rows are bound by reading the weight, so nothing else may stand in its way: codes go from memory to the registers
of a tensor core's left operand, in whose order they are packed (kernels/reference/int4.py), and out is computed
transposed. Sums over K are split over programs at places that the weight's shape alone decides, and the order within
a split does not depend on the tile's width: a row's sums are the same whatever other rows there are.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllama.kernels import tuning
from fastllama.kernels.checks import as_rows, check_kernel_dtype
from fastllama.kernels.op import Function
from fastllama.kernels.reference.int4 import COLUMNS
from fastllama.kernels.triton.launching import KernelCall, launcher, scratch
from fastllama.kernels.triton.parts import sum_of

# Rows of x, by the bytes of an element: with more, arithmetic outweighs the weight's bytes (and in fp32 sums spill).
FEW = {2: 64, 4: 16}


# Codes less 8 in dtype, exactly: [64 * TILES, BLOCK_K] from row `row`, a multiple of 64, and column `start`. BLOCK_K is
# 64, all four words of a thread, or 32, two of them. Past the last row of tiles there is that one again.
@triton.jit
def load_codes(
    packed_ptr, row_stride, row, start, N: tl.constexpr, dtype: tl.constexpr, TILES: tl.constexpr, BLOCK_K: tl.constexpr
):
    lane, word = tl.arange(0, 128 * TILES)[:, None], tl.arange(0, BLOCK_K // 16)[None, :]
    tile = tl.minimum(row // 64 + lane // 128, (N - 1) // 64)
    packed_ptr += start // 64 * 512
    if BLOCK_K == 32:
        packed_ptr += start % 64 // 16
    words = tl.load(packed_ptr + tile * row_stride + (lane % 128 * 4 + word)).to(tl.uint32, bitcast=True)  # [lanes, t]
    first = tl.join(numbers(words, dtype), numbers(words >> 8, dtype))  # [lanes, t, e, h], of r = 0
    second = tl.join(numbers(words >> 4, dtype), numbers(words >> 12, dtype))
    codes = tl.join(first, second).reshape(4 * TILES, 8, 4, BLOCK_K // 16, 2, 2, 2)  # w, g, q, t, e, h, r
    return codes.trans(0, 6, 1, 3, 5, 2, 4).reshape(64 * TILES, BLOCK_K)


# The lowest 4 bits of both halves of words, less 8: [..., 2]. They become the last bits of a 16-bit number whose last
# place is 1 (1024 in fp16, 128 in bf16), so that one subtraction, which is exact, makes them numbers.
@triton.jit
def numbers(words, dtype: tl.constexpr):
    half: tl.constexpr = tl.bfloat16 if dtype == tl.bfloat16 else tl.float16
    ONES: tl.constexpr = 0x43004300 if dtype == tl.bfloat16 else 0x64006400
    OFFSET: tl.constexpr = 136.0 if dtype == tl.bfloat16 else 1032.0
    words = words & 0x000F000F | ONES
    low = (words & 0xFFFF).to(tl.uint16).to(half, bitcast=True)
    high = (words >> 16).to(tl.uint16).to(half, bitcast=True)
    return (tl.join(low, high) - OFFSET).to(dtype)


# A group's number of each row, in fp32: [rows, 1].
@triton.jit
def per_row(ptr, row, row_stride, group, mask):
    return tl.load(ptr + row * row_stride + group, mask=mask, other=0).to(tl.float32)[:, None]


# One program owns 64 * TILES columns of all rows of out, of one split of K.
@triton.jit
def matmul_kernel(
    x_ptr,
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    out_ptr,
    x_row_stride,
    packed_row_stride,
    scales_row_stride,
    zeros_row_stride,
    out_split_stride,
    out_row_stride,
    num_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    first, split = tl.program_id(0).to(tl.int64) * (64 * TILES), tl.program_id(1).to(tl.int64)
    dtype = x_ptr.dtype.element_ty
    row = tl.arange(0, BLOCK_M).to(tl.int64)  # [M]
    col = first + tl.arange(0, 64 * TILES)  # [N]
    some, inside = (row < num_rows)[None, :], col < N
    acc = tl.zeros([64 * TILES, BLOCK_M], tl.float32)
    begin = tl.program_id(1) * SPLIT
    for tile_start in tl.range(begin, tl.minimum(begin + SPLIT, K), 128, num_stages=STAGES):
        for part in tl.static_range(128 // GROUP):
            products = tl.zeros([64 * TILES, BLOCK_M], tl.float32)
            sums = tl.zeros([64 * TILES, BLOCK_M], tl.float32)
            for block in tl.static_range(GROUP // BLOCK_K):
                start = tile_start + (part * GROUP + block * BLOCK_K)
                k = start + tl.arange(0, BLOCK_K)[:, None]  # [K, 1]
                x_mask = some if K % 128 == 0 else some & (k < K)
                x = tl.load(x_ptr + row[None, :] * x_row_stride + k, mask=x_mask, other=0.0)  # [K, M]
                codes = load_codes(packed_ptr, packed_row_stride, first, start, N, dtype, TILES, BLOCK_K)
                products = tl.dot(codes, x, products, input_precision="ieee")
                if zeros_ptr is not None:  # the sums of x in every row, in the layout in which they are needed
                    ones = tl.full([64 * TILES, BLOCK_K], 1.0, dtype)
                    sums = tl.dot(ones, x, sums, input_precision="ieee")
            group = tl.minimum(tile_start // GROUP + part, GROUPS - 1)  # past K, where x is 0, there is none
            if zeros_ptr is not None:
                products -= (per_row(zeros_ptr, col, zeros_row_stride, group, inside) - 8.0) * sums
            acc += products * per_row(scales_ptr, col, scales_row_stride, group, inside)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + col, mask=inside, other=0.0).to(tl.float32)[:, None]
    out_ptrs = out_ptr + split * out_split_stride + row[None, :] * out_row_stride + col[:, None]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None] & some)


# One program owns 64 rows and BLOCK_K columns of the weight.
@triton.jit
def dequantize_kernel(
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    weight_ptr,
    packed_row_stride,
    scales_row_stride,
    zeros_row_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first, start = tl.program_id(0).to(tl.int64) * 64, tl.program_id(1) * BLOCK_K
    dtype = weight_ptr.dtype.element_ty
    row = first + tl.arange(0, 64)  # [N]
    col = start + tl.arange(0, BLOCK_K)[None, :]  # [1, K]
    inside, group = row < N, tl.minimum(start // GROUP, GROUPS - 1)
    codes = load_codes(packed_ptr, packed_row_stride, first, start, N, dtype, 1, BLOCK_K).to(tl.float32)
    if zeros_ptr is not None:
        codes -= per_row(zeros_ptr, row, zeros_row_stride, group, inside) - 8.0
    weight = codes * per_row(scales_ptr, row, scales_row_stride, group, inside)
    tl.store(weight_ptr + row[:, None] * K + col, weight.to(dtype), mask=inside[:, None] & (col < K))


def _plan(x: Tensor, packed: Tensor, scales: Tensor) -> tuple[tuning.Int4Launch, int, int, int]:
    """The launch, columns of a split, splits, and the workspace's elements."""
    num_rows, size, features = math.prod(x.shape[:-1]), x.shape[-1], scales.shape[0]
    launch = tuning.int4(x.device, features=features, size=size, itemsize=x.element_size())
    tiles = packed.shape[1]
    split = tuning.ceil_div(tiles, launch.splits)
    splits = tuning.ceil_div(tiles, split)
    if num_rows > FEW[x.element_size()]:
        elements = tuning.ceil_div(features * size * x.element_size(), 4)
    else:
        elements = splits * num_rows * features if splits > 1 else 0
    return launch, split * COLUMNS, splits, elements


def workspace_size(x: Tensor, packed: Tensor, scales: Tensor) -> int:
    """Elements of fp32 that `matmul_int4` needs: the splits' parts of out for few rows, for many the weight."""
    return _plan(x, packed, scales)[3]


def matmul_int4(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    workspace: Tensor | None,
) -> Function | None:
    """See kernels.matmul_int4."""
    check_kernel_dtype("x", x)
    rows, result = as_rows("x", x), as_rows("out", out)
    if rows.shape[0] <= FEW[x.element_size()]:
        return _multiply(x, packed, scales, zeros, bias, out, workspace)
    size = workspace_size(x, packed, scales)
    workspace = scratch(workspace, size, torch.float32, x.device)
    features, columns = scales.shape[0], x.shape[-1]
    weight = workspace[:size].view(x.dtype)[: features * columns].view(features, columns)
    _dequantize(packed, scales, zeros, weight)
    if bias is None:
        torch.mm(rows, weight.T, out=result)
    else:
        torch.addmm(bias, rows, weight.T, out=result)
    return None  # planned each time: many rows hide what that takes


def _groups(scales: Tensor, size: int) -> dict[str, int]:
    """What the kernels must know of groups. One group of all columns counts as one of each tile."""
    groups = scales.shape[1]
    group = size // groups if groups > 1 else COLUMNS
    return {"GROUPS": groups, "GROUP": group, "BLOCK_K": min(group, 64)}


@launcher
def _multiply(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    workspace: Tensor | None,
) -> list[KernelCall]:
    """Few rows."""
    launch, split, splits, elements = _plan(x, packed, scales)
    workspace = scratch(workspace, elements, torch.float32, x.device)
    x, out = as_rows("x", x), as_rows("out", out)
    (num_rows, size), features = x.shape, scales.shape[0]
    if not (num_rows and features):
        return []
    parts = out[None]
    if splits > 1:
        parts = workspace[:elements].view(splits, num_rows, features)
    block_m = max(tuning.power_of_2(num_rows), 16)
    tiles = 1 if block_m == 16 else 2  # every program reads all of x: as often as the weight's bytes at 16 rows
    product = KernelCall(
        matmul_kernel,
        (tuning.ceil_div(packed.shape[0], tiles), splits),
        x_ptr=x,
        packed_ptr=packed,
        scales_ptr=scales,
        zeros_ptr=zeros,
        bias_ptr=bias if splits == 1 else None,
        out_ptr=parts,
        x_row_stride=x.stride(0),
        packed_row_stride=packed.stride(0),
        scales_row_stride=scales.stride(0),
        zeros_row_stride=0 if zeros is None else zeros.stride(0),
        out_split_stride=parts.stride(0),
        out_row_stride=parts.stride(1),
        num_rows=num_rows,
        N=features,
        K=size,
        SPLIT=split,
        TILES=tiles,
        BLOCK_M=block_m,
        STAGES=launch.stages,
        **_groups(scales, size),
        num_warps=tiles * launch.num_warps,
    )
    if splits == 1:
        return [product]
    return [product, sum_of(parts, bias, out)]


@launcher
def _dequantize(packed: Tensor, scales: Tensor, zeros: Tensor | None, weight: Tensor) -> list[KernelCall]:
    """weight: [N, K], contiguous."""
    features, size = weight.shape
    if not features:
        return []
    groups = _groups(scales, size)
    call = KernelCall(
        dequantize_kernel,
        (packed.shape[0], tuning.ceil_div(size, groups["BLOCK_K"])),
        packed_ptr=packed,
        scales_ptr=scales,
        zeros_ptr=zeros,
        weight_ptr=weight,
        packed_row_stride=packed.stride(0),
        scales_row_stride=scales.stride(0),
        zeros_row_stride=0 if zeros is None else zeros.stride(0),
        N=features,
        K=size,
        **groups,
        num_warps=4,
    )
    return [call]
