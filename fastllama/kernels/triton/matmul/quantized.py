"""Matmuls by 4- and 8-bit weights in Triton: by the packed values for few rows, by the dequantized weight for many.

Few rows are bound by reading the weight, so packed values go straight from memory to the registers of a tensor core's
left operand, in whose order they are packed (kernels/reference/int4.py, int8.py), and out is computed transposed.
Split-K depends on the weight's shape alone, and the order of a split's sums not on the tile's width: results are
batch-invariant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllama.arithmetic import ceil_div, power_of_2
from fastllama.kernels.dispatch.checks import as_rows, check_kernel_dtype
from fastllama.kernels.dispatch.fusion import Fusion
from fastllama.kernels.launch import heuristics, tuning
from fastllama.kernels.launch.device import arch
from fastllama.kernels.launch.kernel_call import KernelCall, VendorMatmul, scratch
from fastllama.kernels.reference.int4 import COLUMNS, ROWS
from fastllama.kernels.triton.matmul.epilogue import (
    COUNTERS,
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
from fastllama.kernels.triton.matmul.load_int4 import load_int4
from fastllama.kernels.triton.matmul.load_int8 import load_int8, order, unit
from fastllama.kernels.triton.overlap import prefetch, release, wait


def few_rows(x: Tensor, packed: Tensor) -> int:
    """The most rows of x that are multiplied by packed values: with more, arithmetic outweighs the weight's bytes.

    In fp32 more sums spill, and on sm_100 Triton rounds the values in fp32 to TF32 unasked (triton-lang/triton#10176).
    On sm_80 and sm_89, where both operands are in registers, more rows beside 8-bit values spill.
    """
    target = arch(x.device)
    if x.element_size() == 4:
        return 0 if target == "sm_100" else 16
    return 32 if _bits(packed) == 8 and target in ("sm_80", "sm_89") else 64


# 4-bit values less 8, or 8-bit values over UNIT, in dtype, exactly: [64 * TILES, BLOCK_K]; if ORDERED, by `columns`.
@triton.jit
def load_packed(
    packed_ptr,
    row_stride,
    tile,
    start,
    N: tl.constexpr,
    dtype: tl.constexpr,
    TILES: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BITS: tl.constexpr,
    UNIT: tl.constexpr,
    ORDERED: tl.constexpr,
):
    if BITS == 4:
        codes = load_int4(packed_ptr, row_stride, tile, start, N, dtype, TILES, STEP, BLOCK_K)
    else:
        codes = load_int8(packed_ptr, row_stride, tile, start, N, dtype, TILES, STEP, BLOCK_K, UNIT, ORDERED)
    return codes


@triton.jit
def columns(BLOCK_K: tl.constexpr, BITS: tl.constexpr):
    k = tl.arange(0, BLOCK_K)
    return k if BITS == 4 else order(k)


# Addresses of the 128-byte lines of the first 512 columns from `begin` on, of the tiles that `load_packed` takes.
@triton.jit
def lines(
    packed_ptr,
    row_stride,
    tile,
    begin,
    N: tl.constexpr,
    K: tl.constexpr,
    TILES: tl.constexpr,
    STEP: tl.constexpr,
    BITS: tl.constexpr,
):
    WORDS: tl.constexpr = 256 * BITS  # of 128 columns of a tile
    LINES: tl.constexpr = WORDS // 8
    line = tl.arange(0, LINES * TILES)
    tile = tl.minimum(tile + line // LINES * STEP, (N - 1) // 64)
    word = tl.minimum(begin // 128 * WORDS + line % LINES * 32, tl.cdiv(K, 128) * WORDS - 1)
    return packed_ptr + tile * row_stride + word


# A group's scale, or zero, of each row, in fp32: [rows, 1].
@triton.jit
def per_row(ptr, row, row_stride, group):
    return tl.load(ptr + row * row_stride + group).to(tl.float32)[:, None]


# One program owns 64 * TILES rows of the weight, of a gated one as many of each half, for one split of K and all of x.
@triton.jit(do_not_specialize=["scales_row_stride", "zeros_row_stride", "num_rows"])
def matmul_quantized_kernel(
    x_ptr,
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    norm_ptr,
    residual_ptr,
    out_ptr,
    counters_ptr,
    parts_ptr,
    squares_ptr,
    x_row_stride,
    packed_row_stride,
    scales_row_stride,
    zeros_row_stride,
    out_row_stride,
    residual_row_stride,
    num_rows,
    eps,
    FEATURES: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    BITS: tl.constexpr,
    UNIT: tl.constexpr,
):
    STEP: tl.constexpr = FEATURES // 128 if GATED else 1  # tiles from those of gates to those of ups
    tile = tl.program_id(0).to(tl.int64) * (1 if GATED else TILES)
    dtype = x_ptr.dtype.element_ty
    row = tl.arange(0, BLOCK_M).to(tl.int64)  # [M]
    feature = owned(FEATURES, 64 * TILES, GATED)  # [N]
    some = (row < num_rows)[:, None]
    acc = tl.zeros([64 * TILES, BLOCK_M], tl.float32)
    squares = tl.zeros([BLOCK_M, BLOCK_K // 8], tl.float32)
    begin = tl.program_id(1) * SPLIT
    release(PDL)
    prefetch(lines(packed_ptr, packed_row_stride, tile, begin, FEATURES, SIZE, TILES, STEP, BITS), PDL)
    # A row's 32-byte sector of scales covers 16 groups, mostly a whole split; loaded group by group, each would wait.
    prefetch(scales_ptr + feature * scales_row_stride + tl.minimum(begin // GROUP, GROUPS - 1), PDL)
    if zeros_ptr is not None:
        prefetch(zeros_ptr + feature * zeros_row_stride + tl.minimum(begin // GROUP, GROUPS - 1), PDL)
    wait(PDL)
    packed_ptr += begin // 128 * (256 * BITS)
    x_ptr += begin
    for tile_start in tl.range(begin, tl.minimum(begin + SPLIT, SIZE), 128, num_stages=STAGES):
        for part in tl.static_range(128 // GROUP):
            products = tl.zeros([64 * TILES, BLOCK_M], tl.float32)
            sums = tl.zeros([64 * TILES, BLOCK_M], tl.float32)
            for block in tl.static_range(GROUP // BLOCK_K):
                place = part * GROUP + block * BLOCK_K
                within = place + columns(BLOCK_K, BITS)  # [K], in the tile
                col = tile_start + within
                exists = col < SIZE
                x_mask = some if SIZE % 128 == 0 else some & exists[None, :]
                x = tl.load(x_ptr + row[:, None] * x_row_stride + within[None, :], mask=x_mask, other=0.0)  # [M, K]
                if norm_ptr is not None:
                    squares += squares_of(x)
                    x = weighted(x, norm_ptr, col, exists)
                codes = load_packed(
                    packed_ptr, packed_row_stride, tile, place, FEATURES, dtype, TILES, STEP, BLOCK_K, BITS, UNIT, True
                )
                products = tl.dot(codes, tl.trans(x), products, input_precision="ieee")
                if zeros_ptr is not None:  # the sums of x, repeated in each row: in the layout that is needed
                    ones = tl.full([64 * TILES, BLOCK_K], 1.0, dtype)
                    sums = tl.dot(ones, tl.trans(x), sums, input_precision="ieee")
            group = tl.minimum(tile_start // GROUP + part, GROUPS - 1)  # past K, where x is 0, there is no group
            if zeros_ptr is not None:
                products -= (per_row(zeros_ptr, feature, zeros_row_stride, group) - 8.0) * sums
            acc += products * (per_row(scales_ptr, feature, scales_row_stride, group) * UNIT)
        packed_ptr += 256 * BITS  # advanced, as in dense.py
        x_ptr += 128
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


# One program owns 64 rows and BLOCK_K columns of the weight.
@triton.jit(do_not_specialize=["scales_row_stride", "zeros_row_stride"])
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
    BITS: tl.constexpr,
    UNIT: tl.constexpr,
):
    tile, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_K
    dtype = weight_ptr.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * 64
    row, inside = owned(N, 64, False), first + tl.arange(0, 64) < N  # [N]
    col = start + tl.arange(0, BLOCK_K)[None, :]  # [1, K]
    group = tl.minimum(start // GROUP, GROUPS - 1)
    codes = load_packed(packed_ptr, packed_row_stride, tile, start, N, dtype, 1, 1, BLOCK_K, BITS, UNIT, False)
    codes = codes.to(tl.float32)
    if zeros_ptr is not None:
        codes -= per_row(zeros_ptr, row, zeros_row_stride, group) - 8.0
    weight = codes * (per_row(scales_ptr, row, scales_row_stride, group) * UNIT)
    tl.store(weight_ptr + row[:, None] * K + col, weight.to(dtype), mask=inside[:, None] & (col < K))


def _plan(num_rows: int, x: Tensor, packed: Tensor, scales: Tensor) -> tuple[heuristics.QuantizedMatmulLaunch, Splits]:
    size, features = x.shape[-1], scales.shape[0]
    choose = tuning.int4 if _bits(packed) == 4 else tuning.int8
    launch = choose(x.device, features=features, size=size, itemsize=x.element_size())
    tiles = packed.shape[0] + 1  # a program may own two
    return launch, splits_of(num_rows, size, COLUMNS, tiles, ROWS, launch.splits)


def workspace_size(x: Tensor, packed: Tensor, scales: Tensor) -> int:
    """Elements of fp32 that a matmul needs for as many rows as x has, or fewer."""
    rows, few = math.prod(x.shape[:-1]), few_rows(x, packed)
    parts = _plan(min(rows, few), x, packed, scales)[1].elements
    return parts if rows <= few else max(parts, _weight_elements(x, scales))


def _weight_elements(x: Tensor, scales: Tensor) -> int:
    """Elements of fp32 of a workspace that holds the weight in x's dtype, for many rows."""
    return COUNTERS + ceil_div(scales.shape[0] * x.shape[-1] * x.element_size(), 4)


def fuses(x: Tensor, packed: Tensor, scales: Tensor, fusion: Fusion) -> Fusion:
    """The part of a Fusion that the kernel computes: none for many rows, which run in torch.

    A gated weight needs whole tiles of gates and of ups; in fp32 the sums of two tiles spill.
    """
    if math.prod(x.shape[:-1]) > few_rows(x, packed):
        return Fusion()
    features = scales.shape[0]
    gates = features % (2 * ROWS) == 0 and x.element_size() == 2
    norms = fusion.norm is None or fuses_norm(x)
    if norms and (gates or not fusion.gated):
        return fusion
    return fusion._replace(norm=fusion.norm if norms else None, gated=fusion.gated and gates)


def _bits(packed: Tensor) -> int:
    return 8 if packed.dtype == torch.int8 else 4


def _words(packed: Tensor) -> Tensor:
    """Packed values as kernels read them, int32. Raises ValueError unless rows begin at multiples of 4 bytes."""
    try:
        return packed.view(torch.int32)
    except RuntimeError:
        raise ValueError(
            f"packed has stride {packed.stride(0)} and storage offset {packed.storage_offset()}; legal: multiples of 4"
        ) from None


def _format(x: Tensor, packed: Tensor, scales: Tensor, size: int) -> dict[str, int]:
    """The kernels' constants of a packed format and x's dtype. A single group of all columns is one for each tile."""
    groups, bits = scales.shape[1], _bits(packed)
    group = size // groups if groups > 1 else COLUMNS
    known = {"GROUPS": groups, "GROUP": group, "BLOCK_K": min(group, 64)}
    return known | {"BITS": bits, "UNIT": 1 if bits == 4 else unit(x)}


def multiply(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    fusion: Fusion,
    out: Tensor,
    workspace: Tensor | None,
) -> Sequence[KernelCall | VendorMatmul]:
    """x @ weight^T for packed values of 4 or 8 bits: few rows by the packed values, many by the dequantized weight."""
    check_kernel_dtype("x", x)
    rows, result = as_rows("x", x), as_rows("out", out)
    if rows.shape[0] <= few_rows(x, packed):
        return _multiply_few(rows, packed, scales, zeros, bias, fusion, result, workspace)
    assert fusion.is_empty, "see `fuses`"
    features, size, elements = scales.shape[0], rows.shape[1], _weight_elements(x, scales)
    held = scratch(workspace, elements, torch.float32, x.device)
    weight = held[COUNTERS:elements].view(x.dtype)[: features * size].view(features, size)
    return [*_dequantize(packed, scales, zeros, weight), VendorMatmul(rows, weight, bias, result)]


def _multiply_few(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    fusion: Fusion,
    out: Tensor,
    workspace: Tensor | None,
) -> list[KernelCall]:
    """x: [M, K], out: [M, N]."""
    (num_rows, size), features = x.shape, scales.shape[0]
    launch, splits = _plan(num_rows, x, packed, scales)
    if not out.numel():
        return []
    words = _words(packed)
    block_m = max(power_of_2(num_rows), 16)
    # Each program reads all of x: at 16 rows as many bytes as a tile of 8-bit values. Of a gated weight it owns a tile
    # of the gate and one of up. In fp32 the sums of two tiles spill.
    wide = fusion.gated or (_bits(packed) == 8 and x.element_size() == 2)
    groups_of_warps = 2 if block_m > 16 or (fusion.gated and _bits(packed) == 4) else 1
    tiles = 2 if wide else groups_of_warps
    spills = block_m == 64 and fusion.norm is not None and _bits(packed) == 8 and arch(x.device) == "gfx942"
    call = KernelCall(
        matmul_quantized_kernel,
        (ceil_div(packed.shape[0], tiles), splits.count),
        **arguments(features, splits, bias, fusion, out, workspace),
        x_ptr=x,
        packed_ptr=words,
        scales_ptr=scales,
        zeros_ptr=zeros,
        x_row_stride=x.stride(0),
        packed_row_stride=words.stride(0),
        scales_row_stride=scales.stride(0),
        zeros_row_stride=0 if zeros is None else zeros.stride(0),
        SIZE=size,
        TILES=tiles,
        BLOCK_M=block_m,
        STAGES=max(launch.stages, 3) if spills else launch.stages,  # 88 bytes in two stages, with Triton 3.9
        **_format(x, packed, scales, size),
        num_warps=groups_of_warps * launch.num_warps,
    )
    return [call]


def _dequantize(packed: Tensor, scales: Tensor, zeros: Tensor | None, weight: Tensor) -> list[KernelCall]:
    """weight: [N, K], contiguous."""
    features, size = weight.shape
    if not features:
        return []
    constants, words = _format(weight, packed, scales, size), _words(packed)
    call = KernelCall(
        dequantize_kernel,
        (words.shape[0], ceil_div(size, constants["BLOCK_K"])),
        packed_ptr=words,
        scales_ptr=scales,
        zeros_ptr=zeros,
        weight_ptr=weight,
        packed_row_stride=words.stride(0),
        scales_row_stride=scales.stride(0),
        zeros_row_stride=0 if zeros is None else zeros.stride(0),
        N=features,
        K=size,
        **constants,
        num_warps=4,
    )
    return [call]
