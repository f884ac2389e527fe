"""Prologue and epilogue of matmuls of few rows: RMSNorm of x, split-K reduction, bias, SwiGLU and residual.

Split-K depends on the weight's shape alone. Each program stores its partial sums and increments the tile's counter; the
last program of a tile reduces the splits, in one order: no second launch, and sums are batch-invariant. Counters are
zero again after each launch.

The norm's factor of a row is known only when the whole row has been read. So x is multiplied by the norm's weight
alone, its squares are summed on the way, and the factor multiplies the sums. Squares are summed in pairs that the code
names, not in an order that a layout chooses: the factor is batch-invariant, too.
Source: counting programs, as stream-K does: Osama et al., Stream-K (2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllama.arithmetic import ceil_div
from fastllama.kernels.dispatch.checks import as_rows
from fastllama.kernels.dispatch.fusion import Fusion
from fastllama.kernels.launch.kernel_call import scratch
from fastllama.kernels.triton.overlap import overlapping

COUNTERS = 4096  # the first elements of a workspace: one for each tile of features that is split


# The rows of the weight that a program owns, [BLOCK_N]: those past the last repeat the last. Of a gated weight
# [gate | up], half are the gate's and half are up's.
@triton.jit
def owned(FEATURES: tl.constexpr, BLOCK_N: tl.constexpr, GATED: tl.constexpr):
    lane = tl.arange(0, BLOCK_N)
    if GATED:
        feature = tl.minimum(tl.program_id(0) * (BLOCK_N // 2) + lane % (BLOCK_N // 2), FEATURES // 2 - 1)
        feature += lane // (BLOCK_N // 2) * (FEATURES // 2)
    else:
        feature = tl.minimum(tl.program_id(0) * BLOCK_N + lane, FEATURES - 1)
    return feature.to(tl.int64)


# x [M, K] times the norm's weight of its columns, rounded to x's dtype.
@triton.jit
def weighted(x, norm_ptr, col, mask):
    norm = tl.load(norm_ptr + col, mask=mask, other=0.0).to(tl.float32)
    return (x.to(tl.float32) * norm[None, :]).to(x.dtype)


# Sums of the squares of 8 neighbours of x [M, K]: [M, K / 8].
@triton.jit
def squares_of(x):
    x = x.to(tl.float32)
    return pairs(pairs(pairs(x * x)))


# Sums of two neighbours: [M, K] -> [M, K / 2].
@triton.jit
def pairs(x):
    first, second = tl.split(x.reshape(x.shape[0], x.shape[1] // 2, 2))
    return first + second


# [M, 4], [M, 8] or [M, 16] -> [M]: sums of rows.
@triton.jit
def row_sums(x):
    if x.shape[1] == 16:
        x = pairs(x)
    if x.shape[1] == 8:
        x = pairs(x)
    first, second = tl.split(pairs(x))
    return first + second


# Reduces the splits of a tile and stores out. acc: [N, M], one split's sums of the `owned` features; squares: [M], of
# its columns of x; row: [M]. The last program of a tile reduces a few rows at a time: all at once take all registers.
@triton.jit
def reduce_and_store(
    acc,
    squares,
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
    FEATURES: tl.constexpr,
    SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    GATED: tl.constexpr,
):
    operands = (out_ptr, bias_ptr, norm_ptr, residual_ptr, eps, out_row_stride, residual_row_stride)
    if SPLITS == 1:
        store(acc, squares, row, num_rows, operands, FEATURES, SIZE, GATED)
    else:
        BLOCK_N: tl.constexpr = acc.shape[0]
        tile, split = tl.program_id(0), tl.program_id(1).to(tl.int64)
        parts_ptr += tile.to(tl.int64) * SPLITS * num_rows * BLOCK_N  # [SPLITS, rows, N]
        squares_ptr += tile.to(tl.int64) * SPLITS * num_rows  # [SPLITS, rows]
        place = split * num_rows + row
        part_ptrs = parts_ptr + place[None, :] * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        tl.store(part_ptrs, acc, mask=(row < num_rows)[None, :])
        if norm_ptr is not None:
            tl.store(squares_ptr + place, squares, mask=row < num_rows)
        tl.debug_barrier()  # all threads have stored before one of them counts
        if tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
            ROWS: tl.constexpr = min(1024 // BLOCK_N, acc.shape[1])
            for first in tl.static_range(0, acc.shape[1], ROWS):
                some = first + tl.arange(0, ROWS).to(tl.int64)
                total, squares_total = sums_of_splits(some, num_rows, norm_ptr, parts_ptr, squares_ptr, BLOCK_N, SPLITS)
                store(total, squares_total, some, num_rows, operands, FEATURES, SIZE, GATED)
            # Reset for the next launch, which counts only when this one has ended: after all loads, without a fence.
            tl.atomic_xchg(counters_ptr + tile, 0, sem="relaxed")


# The sums over all splits of a tile, for rows [M]: [N, M], and with a norm the rows' sums of squares: [M].
@triton.jit
def sums_of_splits(row, num_rows, norm_ptr, parts_ptr, squares_ptr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr):
    mask = row < num_rows
    total, squares = tl.zeros([BLOCK_N, row.shape[0]], tl.float32), tl.zeros(row.shape, tl.float32)
    place = row
    for _ in tl.static_range(SPLITS):
        part_ptrs = parts_ptr + place[None, :] * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        total += tl.load(part_ptrs, mask=mask[None, :], other=0.0, cache_modifier=".cg")
        if norm_ptr is not None:
            squares += tl.load(squares_ptr + place, mask=mask, other=0.0, cache_modifier=".cg")
        place += num_rows
    return total, squares


# Stores rows of out from complete sums acc [N, M] and squares [M]. operands: a tuple, from `reduce_and_store`.
@triton.jit
def store(
    acc,
    squares,
    row,
    num_rows,
    operands,
    FEATURES: tl.constexpr,
    SIZE: tl.constexpr,
    GATED: tl.constexpr,
):
    out_ptr, bias_ptr, norm_ptr, residual_ptr, eps, out_row_stride, residual_row_stride = operands
    BLOCK_N: tl.constexpr = acc.shape[0]
    WIDTH: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    COLUMNS: tl.constexpr = FEATURES // 2 if GATED else FEATURES
    if norm_ptr is not None:
        acc *= tl.rsqrt(squares / SIZE + eps)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + owned(FEATURES, BLOCK_N, GATED)).to(tl.float32)[:, None]
    if GATED:
        gate, up = tl.split(acc.reshape(2, WIDTH, acc.shape[1]).trans(1, 2, 0))  # [N / 2, M] each
        acc = gate / (1.0 + tl.exp(-gate)) * up
    col = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    mask = (col < COLUMNS)[:, None] & (row < num_rows)[None, :]
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + row[None, :] * residual_row_stride + col[:, None]
        acc += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + row[None, :] * out_row_stride + col[:, None]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Splits:
    """How a weight's columns are split over programs, and the layout of the workspace.

    columns: of one split, whole tiles. count: of splits. parts, squares: where partial sums and sums of squares begin,
    in elements of fp32, after the counters. elements: of the workspace; 0 for one split.
    """

    columns: int
    count: int
    parts: int
    squares: int
    elements: int


def splits_of(num_rows: int, size: int, block: int, tiles: int, width: int, wanted: int) -> Splits:
    """Up to `wanted` splits of `size` columns, each of whole blocks, none empty; for `tiles` tiles of `width` rows."""
    blocks = max(ceil_div(size, block), 1)
    each = ceil_div(blocks, wanted)
    count = ceil_div(blocks, each)
    if count == 1 or tiles > COUNTERS:
        return Splits(blocks * block, 1, 0, 0, 0)
    places = count * num_rows * tiles
    return Splits(each * block, count, COUNTERS, COUNTERS + places * width, COUNTERS + places * (width + 1))


def arguments(
    features: int,
    splits: Splits,
    bias: Tensor | None,
    fusion: Fusion,
    out: Tensor,
    workspace: Tensor | None,
) -> dict[str, Any]:
    """The arguments of a kernel that `owned` and `reduce_and_store` take. out: [M, N]."""
    residual = None if fusion.residual is None else as_rows("residual", fusion.residual)
    held = scratch(workspace, splits.elements, torch.float32, out.device)
    if workspace is None:
        held[:COUNTERS].zero_()
    split = splits.count > 1
    return {
        "num_rows": out.shape[0],
        "out_ptr": out,
        "bias_ptr": bias,
        "norm_ptr": fusion.norm,
        "residual_ptr": residual,
        "counters_ptr": held[:COUNTERS].view(torch.int32) if split else None,
        "parts_ptr": held[splits.parts : splits.squares] if split else None,
        "squares_ptr": held[splits.squares : splits.elements] if split else None,
        "eps": fusion.eps,
        "out_row_stride": out.stride(0),
        "residual_row_stride": 0 if residual is None else residual.stride(0),
        "FEATURES": features,
        "SPLIT": splits.columns,
        "SPLITS": splits.count,
        "GATED": fusion.gated,
        **overlapping(out.device),
    }


def fuses_norm(x: Tensor) -> bool:
    """Whether the norm's weight may multiply x before the norm's factor does.

    Not in fp16, which may overflow, nor in fp32, where a tile in registers spills.
    """
    return x.dtype == torch.bfloat16
