"""Matmuls by weights in 12 bits: three quarters of bf16's bytes, decoded in registers faster than memory is read.

See kernels/reference/bf12.py for the layout. A block of 64 weights takes 3 loads and about 30 instructions of AVX2: 20
billion weights a second and thread from the cache, where two threads read 24 billion from memory.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from fastllama.arithmetic import ceil_div
from fastllama.kernels import reference
from fastllama.kernels.cpu.matmul import by_blocks
from fastllama.kernels.dispatch.checks import as_rows
from fastllama.kernels.dispatch.isolation import full_precision
from fastllama.kernels.numba.matmul import ROW_LIMIT
from fastllama.kernels.numba.numerics import (
    FAST,
    LIKE,
    array,
    jit,
    load,
    load_integer,
    store,
)
from fastllama.kernels.numba.pieces import enter, leave, proceed
from fastllama.kernels.numba.threads import launch
from fastllama.kernels.numba.vectors import FLOATS, I8, I32, WORDS, at, broadcast, fetch, read, splat
from fastllama.kernels.reference.bf12 import BLOCK, BLOCK_BYTES, CODES, commonest_exponent

HALF = BLOCK // 2
CHUNK = 16  # output features of one iteration, which share one search for their first outlier
AHEAD = 1024  # bytes prefetched: 52 ms in place of 57 for the weights of a 1.1B model
OPERATIONS = 8  # to pack a weight
LARGEST_X = 100  # power of two that the largest value of x is scaled to; weights as decoded are 2^-126 to 2^-111

_FLAGS = tuple(FAST)
_BYTES = ir.VectorType(I8, 32)


def _decoded(builder, address):
    """The 64 weights of the block at `address`, in order, as eight vectors of float32, times 2^(1 - exponent)."""
    low = [read(builder, address, 32 * half, _BYTES) for half in range(2)]
    both = read(builder, address, BLOCK, _BYTES)
    four, seven, sign = (splat(_BYTES, value) for value in (4, 7, 0x80))
    turned = [builder.and_(builder.shl(both, four), sign), builder.and_(builder.lshr(both, four), seven)]
    high = [builder.and_(both, splat(_BYTES, 0x87)), builder.or_(*turned)]
    for half in range(2):
        for start in (0, 8):  # of each 128 bits: what AVX2 interleaves in one instruction
            places = [i for lane in (0, 16) for i in range(lane + start, lane + start + 8)]
            mask = [I32(index) for i in places for index in (i, i + 32)]
            order = ir.Constant(ir.VectorType(I32, 32), mask)
            words = builder.bitcast(builder.shuffle_vector(low[half], high[half], order), WORDS)
            yield builder.bitcast(builder.shl(words, splat(WORDS, 16)), FLOATS)
            yield builder.bitcast(builder.and_(words, splat(WORDS, 0xFFFF0000)), FLOATS)


def _dots(builder, codes, rows, blocks):
    """The dot products of 64 * blocks packed weights at an address with as many float32 at each of `rows`."""
    count = 8 // len(rows)  # vectors of sums for each row: all of them stay in registers
    sums = [[cgutils.alloca_once_value(builder, splat(FLOATS, 0.0)) for _ in range(count)] for _ in rows]
    with cgutils.for_range(builder, blocks) as loop:
        block = builder.add(codes, builder.mul(loop.index, codes.type(BLOCK_BYTES)))
        for offset in (AHEAD, AHEAD + 64):
            fetch(builder, at(builder, block, offset, I8))
        starts = [builder.add(x, builder.mul(loop.index, x.type(4 * BLOCK))) for x in rows]
        for i, weights in enumerate(_decoded(builder, block)):
            for start, own in zip(starts, sums, strict=True):
                values = read(builder, start, 32 * i, FLOATS)
                product = builder.fmul(weights, values, flags=_FLAGS)
                builder.store(builder.fadd(builder.load(own[i % count]), product, flags=_FLAGS), own[i % count])
    return [_total(builder, [builder.load(each) for each in own]) for own in sums]


def _total(builder, vectors):
    """The sum of all lanes of vectors, whose number is a power of two."""
    while len(vectors) > 1:
        vectors = [builder.fadd(a, b, flags=_FLAGS) for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
    (result,) = vectors
    for width in (4, 2, 1):  # the lanes beyond `width` are added to the first
        halves = [ir.Constant(ir.VectorType(I32, width), [*map(I32, range(at, at + width))]) for at in (0, width)]
        low, high = (builder.shuffle_vector(result, result, half) for half in halves)
        result = builder.fadd(low, high, flags=_FLAGS)
    return builder.extract_element(result, I32(0))


@intrinsic
def dot(context, codes, x, blocks):
    """The dot product of a row of packed weights at an address with float32 at another, times 2^(1 - exponent)."""

    def generate(context, builder, signature, args):
        codes, x, blocks = args
        return _dots(builder, codes, [x], blocks)[0]

    return types.float32(types.int64, types.int64, types.int64), generate


@intrinsic
def dot_of_four(context, codes, a, b, c, d, blocks):
    """`dot` with four rows of float32."""

    def generate(context, builder, signature, args):
        codes, *rows, blocks = args
        return context.make_tuple(builder, signature.return_type, _dots(builder, codes, rows, blocks))

    return types.UniTuple(types.float32, 4)(*[types.int64] * 6), generate


@intrinsic
def decode(context, codes, out, blocks, scale):
    """Decode 64 * blocks packed weights at an address to float32 at another, times scale = 2^(exponent - 1)."""

    def generate(context, builder, signature, args):
        codes, out, blocks, scale = args
        factor = broadcast(builder, scale)
        with cgutils.for_range(builder, blocks) as loop:
            block = builder.add(codes, builder.mul(loop.index, codes.type(BLOCK_BYTES)))
            start = builder.add(out, builder.mul(loop.index, out.type(4 * BLOCK)))
            for i, weights in enumerate(_decoded(builder, block)):
                builder.store(builder.fmul(weights, factor), at(builder, start, 32 * i, FLOATS), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.float32), generate


@jit
def first_outlier(outliers_ptr, count, row):
    """The first of the ordered outliers that is in a row or in a later one."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if load_integer(outliers_ptr, 3 * middle, np.int32(0)) < row:
            low = middle + 1
        else:
            high = middle
    return low


# Rows of x in float32, the largest finite value of each scaled to 2^100, so that no term with a decoded weight
# underflows. scales: the factors of a row's dot products that undo this.
@jit
def scale_rows_kernel(x_ptr, wide_ptr, scales, x_stride, size, exponent, like):
    for m in range(scales.shape[0]):
        largest = np.float32(0)
        for k in range(size):
            value = abs(load(x_ptr, m * x_stride + k, like))
            if value > largest and value < np.float32(np.inf):
                largest = value
        power = LARGEST_X - math.frexp(largest)[1]
        scale = 2.0**power
        for k in range(size):
            store(wide_ptr, m * size + k, np.float32(load(x_ptr, m * x_stride + k, like) * scale), np.float32(0))
        scales[m] = 2.0 ** (exponent - 1 - power)


@jit
def store_with_outliers(total, x_ptr, outliers_ptr, out_ptr, outlier, end, size, scale, like):
    """Store total * scale plus the terms of the outliers from `outlier` to `end`: one after another, so in fp64.

    NaN if x does not have the column of an outlier.
    """
    total *= scale
    for i in range(outlier, end):
        column = load_integer(outliers_ptr, 3 * i + 1, np.int32(0))
        if 0 <= column < size:
            total += np.float64(load(outliers_ptr, 3 * i + 2, np.float32(0))) * load(x_ptr, column, like)
        else:
            total = np.nan
    store(out_ptr, 0, np.float32(total), like)


# One iteration owns CHUNK output features. Strides count bytes.
@jit
def matmul_bf12_kernel(region, *args):
    (
        codes_ptr,
        x_ptr,
        wide_ptr,
        outliers_ptr,
        out_ptr,
        scales_ptr,
        codes_stride,
        x_stride,
        out_stride,
        rows,
        features,
        blocks,
        num_outliers,
        itemsize,
        like,
    ) = args
    scales = array(scales_ptr, (rows,), np.float64(0))
    first_chunk, last_chunk = enter(region, args)
    while first_chunk < last_chunk:
        for chunk in range(first_chunk, last_chunk):
            first = CHUNK * chunk
            end = first_outlier(outliers_ptr, num_outliers, first)
            for n in range(first, min(first + CHUNK, features)):
                row_ptr, to, size = codes_ptr + n * codes_stride, out_ptr + n * itemsize, blocks * BLOCK
                outlier = end
                while end < num_outliers and load_integer(outliers_ptr, 3 * end, np.int32(0)) == n:
                    end += 1
                if rows == 1:
                    total = dot(row_ptr, wide_ptr, blocks)
                    store_with_outliers(total, x_ptr, outliers_ptr, to, outlier, end, size, scales[0], like)
                    continue
                last = rows - 1
                for m in range(0, last + 1, 4):
                    a, b, c, d = m, min(m + 1, last), min(m + 2, last), min(m + 3, last)
                    row_bytes = blocks * (4 * BLOCK)
                    totals = dot_of_four(
                        row_ptr,
                        wide_ptr + a * row_bytes,
                        wide_ptr + b * row_bytes,
                        wide_ptr + c * row_bytes,
                        wide_ptr + d * row_bytes,
                        blocks,
                    )
                    for i, row in enumerate((a, b, c, d)):
                        x_row, out_row = x_ptr + row * x_stride, to + row * out_stride
                        scale = scales[row]
                        store_with_outliers(totals[i], x_row, outliers_ptr, out_row, outlier, end, size, scale, like)
        first_chunk, last_chunk = proceed(region)
    return leave(region)


# Decodes the weight from row `start` on to float32 at `wide`. One iteration owns one row.
@jit
def widen_bf12_kernel(region, *args):
    codes_ptr, wide_ptr, outliers_ptr, start, codes_stride, blocks, num_outliers, scale = args
    first, last = enter(region, args)
    while first < last:
        for row in range(first, last):
            n, to = start + row, wide_ptr + row * blocks * (4 * BLOCK)
            decode(codes_ptr + n * codes_stride, to, blocks, scale)
            outlier = first_outlier(outliers_ptr, num_outliers, n)
            while outlier < num_outliers and load_integer(outliers_ptr, 3 * outlier, np.int32(0)) == n:
                column = load_integer(outliers_ptr, 3 * outlier + 1, np.int32(0))
                if 0 <= column < blocks * BLOCK:
                    store(to, column, load(outliers_ptr, 3 * outlier + 2, np.float32(0)), np.float32(0))
                else:  # the whole row: a NaN in one place could be an outlier's own
                    for k in range(blocks * BLOCK):
                        store(to, k, np.float32(np.nan), np.float32(0))
                    break
                outlier += 1
        first, last = proceed(region)
    return leave(region)


def matmul_bf12(x: Tensor, codes: Tensor, outliers: Tensor, exponent: int, bias: Tensor | None, out: Tensor) -> None:
    """See kernels.matmul_bf12."""
    (features, row_bytes), like = codes.shape, LIKE.get(x.dtype)
    blocks = row_bytes // BLOCK_BYTES
    size = blocks * BLOCK
    rows = x.numel() // size if size else 0
    if not rows or like is None:
        out.copy_(reference.matmul_bf12(x, codes, outliers, exponent, bias))
        return
    source, target = as_rows("x", x), as_rows("out", out)
    if rows <= ROW_LIMIT:
        wide, scales = torch.empty(rows, size, dtype=torch.float32, device=x.device), np.empty(rows)
        scale_rows_kernel(x.data_ptr(), wide.data_ptr(), scales, source.stride(0), size, exponent, like)
        launch(
            matmul_bf12_kernel,
            ceil_div(features, CHUNK),
            rows * features * size,
            codes.data_ptr(),
            x.data_ptr(),
            wide.data_ptr(),
            outliers.data_ptr(),
            out.data_ptr(),
            scales.ctypes.data,
            codes.stride(0),
            source.stride(0) * x.itemsize,
            target.stride(0) * x.itemsize,
            rows,
            features,
            blocks,
            outliers.shape[0],
            x.itemsize,
            like,
        )
    else:
        scale = np.float32(2.0 ** (exponent - 1))
        places = (codes.stride(0), blocks, outliers.shape[0], scale)

        def widen(first: int, wide: Tensor) -> None:
            pointers = (codes.data_ptr(), wide.data_ptr(), outliers.data_ptr())
            launch(widen_bf12_kernel, wide.shape[0], wide.numel(), *pointers, first, *places)

        with full_precision("cpu"):
            by_blocks(source, features, target, widen)
    if bias is not None:
        out += bias


@jit
def parts_of_bf16(word, exponent):
    """(`code` of the exponent, mantissa, whether it is an outlier) of the bits of a bf16 number."""
    code = (word >> 7 & 0xFF) - (exponent - 1)
    fits = 1 <= code <= CODES
    return (code, word & 0x7F, False) if fits else (0, 0, word & 0x7FFF != 0)


# Packs the weight and counts the outliers of each row. One iteration owns one row.
@jit
def pack_bf12_kernel(region, *args):
    bits_ptr, codes_ptr, counts_ptr, features, size, exponent = args
    bits = array(bits_ptr, (features, size), np.int16(0))
    codes = array(codes_ptr, (features, size // BLOCK * BLOCK_BYTES), np.uint8(0))
    counts = array(counts_ptr, (features,), np.int64(0))
    first, last = enter(region, args)
    while first < last:
        for n in range(first, last):
            found = 0
            for block in range(size // BLOCK):
                start = block * BLOCK_BYTES
                for i in range(HALF):
                    a, b = np.int32(bits[n, block * BLOCK + i]), np.int32(bits[n, block * BLOCK + HALF + i])
                    code_a, mantissa_a, lost_a = parts_of_bf16(a, exponent)
                    code_b, mantissa_b, lost_b = parts_of_bf16(b, exponent)
                    found += lost_a + lost_b
                    to = start + ((i >> 2 & 1) << 4 | i >> 4 << 3 | (i & 3) << 1 | i >> 3 & 1)  # see reference.bf12
                    codes[n, to] = (code_a & 1) << 7 | mantissa_a
                    codes[n, to + HALF] = (code_b & 1) << 7 | mantissa_b
                    codes[n, to + BLOCK] = a >> 8 & 0x80 | code_a >> 1 | b >> 12 & 8 | code_b >> 1 << 4
            counts[n] = found
        first, last = proceed(region)
    return leave(region)


# Lists the outliers, those of row n from place starts[n] on. One iteration owns one row.
@jit
def list_outliers_kernel(region, *args):
    bits_ptr, starts_ptr, outliers_ptr, features, size, exponent = args
    bits, starts = array(bits_ptr, (features, size), np.int16(0)), array(starts_ptr, (features + 1,), np.int64(0))
    outliers = array(outliers_ptr, (starts[features], 3), np.int32(0))
    first, last = enter(region, args)
    while first < last:
        for n in range(first, last):
            at = starts[n]
            for k in range(size):
                word = np.int32(bits[n, k])
                if parts_of_bf16(word, exponent)[2]:
                    outliers[at, 0], outliers[at, 1], outliers[at, 2] = n, k, word << 16
                    at += 1
        first, last = proceed(region)
    return leave(region)


def pack_bf12(weight: Tensor) -> tuple[Tensor, Tensor, int]:
    """See kernels.pack_bf12."""
    exponent = commonest_exponent(weight)
    (features, size), weight = weight.shape, weight.contiguous()
    codes = torch.empty(features, size // BLOCK * BLOCK_BYTES, dtype=torch.uint8, device=weight.device)
    counts = torch.zeros(features + 1, dtype=torch.int64, device=weight.device)
    work, shape = OPERATIONS * weight.numel(), (features, size, exponent)
    launch(pack_bf12_kernel, features, work, weight.data_ptr(), codes.data_ptr(), counts[1:].data_ptr(), *shape)
    starts = counts.cumsum(0)
    outliers = torch.empty(int(starts[-1]), 3, dtype=torch.int32, device=weight.device)
    launch(list_outliers_kernel, features, work, weight.data_ptr(), starts.data_ptr(), outliers.data_ptr(), *shape)
    return codes, outliers, exponent
