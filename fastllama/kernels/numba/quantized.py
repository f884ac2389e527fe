"""Matmuls by 4- and 8-bit weights in integers: packed values in place, by x in 16-bit fixed point.

Both layouts (kernels/reference/int4.py, int8.py) are runs of 64 bytes, the values of a pair of rows of the weight,
eight apart, and 32 runs make a step: 64 rows and 64 columns of 4-bit values, or 32 of 8-bit ones. x is converted once,
in the order of the packed values; the eight numbers of a step in one lane of a vector share an exponent. So a vector
instruction multiplies 16 values and adds neighbours (vpmaddwd on x86), after a mask or a sign extension, and a lane's
sum is exact. 4-bit values are centred for free: their sums start at -8 times the sum of x.

No sum overflows. x is at most 2^15 - 1 in magnitude, a 4-bit value at bit 4 of its byte at most 240, an 8-bit one 128.
A lane adds eight terms of a step and starts, at bit 4, at 128 times eight of x: 8 * (240 + 128) * (2^15 - 1) < 2^27.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from fastllama.arithmetic import ceil_div
from fastllama.kernels.dispatch.checks import as_rows
from fastllama.kernels.numba.fixed_point import RECORD, fixed_point_kernel
from fastllama.kernels.numba.numerics import LIKE, array, jit, load, store
from fastllama.kernels.numba.pieces import enter, leave, proceed
from fastllama.kernels.numba.threads import launch
from fastllama.kernels.numba.vectors import (
    FLOATS,
    I8,
    I32,
    PAIRS,
    WIDE,
    WORDS,
    at,
    broadcast,
    every_second,
    fetch,
    math,
    read,
    splat,
)
from fastllama.kernels.reference.int4 import ROWS

# The argument of kernels that selects a format: 4 bits, 4 bits in groups of 32 columns (half a step), and 8 bits.
INT4, INT4_BY_32, INT8 = np.uint8(0), np.uint16(0), np.int8(0)
STEP_BYTES = 2048
AHEAD = 4096  # bytes prefetched
# The columns of a step in the order of packed values, 16 of each vector; two of each 16 bits of rows meet in a lane.
_OF_4_BITS = np.arange(64).reshape(4, 2, 2, 2, 2)  # t, h, v, q, e
_OF_8_BITS = np.arange(32).reshape(2, 1, 4, 4).repeat(2, 1)  # c, r, q, i
PLACES = {4: _OF_4_BITS.transpose(2, 1, 3, 0, 4).ravel(), 8: _OF_8_BITS.transpose(2, 0, 1, 3).ravel()}


def _dot_of_pairs(builder, a, b):
    """a * b, with neighbours added: one instruction on x86 (vpmaddwd)."""
    product = builder.mul(builder.sext(a, WIDE), builder.sext(b, WIDE))
    return builder.add(*(every_second(builder, product, e) for e in range(2)))


def _record(builder, address):
    """The vectors of a record: four of x, the sums to start from, the units."""
    x = [read(builder, address, offset, PAIRS) for offset in range(0, 128, 32)]
    return x, read(builder, address, 128, WORDS), read(builder, address, 160, FLOATS)


def _sums_of_4_bits(builder, run, records):
    """For each record, its dot products with 64 bytes of packed values: two rows' sums, the second times 16."""
    sums = [[start, builder.shl(start, splat(WORDS, 4))] for _, start, _ in records]
    for v in range(2):
        word = read(builder, run, 32 * v, PAIRS)
        for h in range(2):
            if h:
                word = builder.lshr(word, splat(PAIRS, 8))
            masked = [builder.and_(word, splat(PAIRS, 0xF << 4 * r)) for r in range(2)]
            for (x, _, _), own in zip(records, sums, strict=True):
                for r in range(2):
                    own[r] = builder.add(own[r], _dot_of_pairs(builder, masked[r], x[2 * v + h]))
    return sums


def _sums_of_8_bits(builder, run, records):
    """The same for 8-bit values: both rows' sums in turn, two lanes each."""
    sums = [[splat(WORDS, 0)] for _ in records]
    for q in range(4):
        codes = builder.sext(read(builder, run, 16 * q, ir.VectorType(I8, 16)), PAIRS)
        for (x, _, _), own in zip(records, sums, strict=True):
            own[0] = builder.add(own[0], _dot_of_pairs(builder, codes, x[q]))
    return sums


def _step(builder, kind, codes, rows, scales, stride, results):
    """Add the dot products of a step with rows of x to their results: 64 vectors of 8 sums, or 32 for 8-bit values.

    rows: addresses of records. scales: address of the fp32 scale of the first row of the weight, the next `stride`
    bytes on. results: addresses.
    """
    i64 = codes.type
    two_of_each = ir.Constant(WORDS, [0, 1, 10, 11, 4, 5, 14, 15])
    # One row's record stays in registers; with more rows LLVM must not try.
    kept = [_record(builder, row) for row in rows] if len(rows) == 1 else None
    with cgutils.for_range(builder, i64(4)) as warps, cgutils.for_range(builder, i64(8)) as lanes:
        number = builder.add(builder.mul(warps.index, i64(8)), lanes.index)
        row_of_weight = builder.add(number, builder.mul(warps.index, i64(8)))
        run = builder.add(codes, builder.mul(number, i64(64)))
        fetch(builder, at(builder, run, AHEAD, I8))
        records = kept or [_record(builder, row) for row in rows]
        sums = (_sums_of_8_bits if kind == types.int8 else _sums_of_4_bits)(builder, run, records)

        def scale(r, offset=0):
            place = builder.mul(builder.add(row_of_weight, i64(8 * r)), stride)
            return broadcast(builder, read(builder, builder.add(scales, place), offset, ir.FloatType()))

        if kind == types.int8:
            places = [number]
            factors = [builder.shuffle_vector(scale(0), scale(1), two_of_each)]
        else:
            places = [builder.add(row_of_weight, i64(8 * r)) for r in range(2)]
            factors = [scale(r) for r in range(2)]
            if kind == types.uint16:  # words t of 2 and 3 have the last 32 columns
                factors = [builder.shuffle_vector(each, scale(r, 4), two_of_each) for r, each in enumerate(factors)]
        for (_, _, units), result, own in zip(records, results, sums, strict=True):
            for place, factor, some in zip(places, factors, own, strict=True):
                to = at(builder, result, builder.mul(place, i64(32)), FLOATS)
                factor = builder.fmul(units, factor)
                total = math(builder, "fmuladd", builder.sitofp(some, FLOATS), factor, builder.load(to, align=1))
                builder.store(total, to, align=1)


def _step_of(count):
    """`_step` for `count` rows."""

    @intrinsic
    def step(context, kind, codes, rows, scales, stride, results):
        def generate(context, builder, signature, args):
            _, codes, rows, scales, stride, results = args
            rows, results = (cgutils.unpack_tuple(builder, each, count) for each in (rows, results))
            _step(builder, signature.args[0], codes, rows, scales, stride, results)
            return context.get_dummy_value()

        addresses, i64 = types.UniTuple(types.int64, count), types.int64
        return types.void(kind, i64, addresses, i64, i64, addresses), generate

    return step


step_of_one, step_of_two, step_of_four = map(_step_of, (1, 2, 4))


@intrinsic
def total(context, kind, results, row):
    """The sum of the lanes of a row of the weight, 0 to 63, among the results of `_step` at an address."""

    def generate(context, builder, signature, args):
        _, results, row = args
        i64 = row.type
        place, parts = row, [[0, 1, 2, 3], [4, 5, 6, 7]]
        if kind == types.int8:
            place = builder.add(builder.mul(builder.lshr(row, i64(4)), i64(8)), builder.and_(row, i64(7)))
            parts = [[0, 1, 4, 5], [2, 3, 6, 7]]
        vector = read(builder, results, builder.mul(place, i64(32)), FLOATS)
        low, high = (builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(I32, 4), part)) for part in parts)
        if kind == types.int8:
            upper = builder.icmp_unsigned("!=", builder.and_(row, i64(8)), i64(0))
            four = builder.select(upper, high, low)
        else:
            four = builder.fadd(low, high)
        lanes = [builder.extract_element(four, I32(i)) for i in range(4)]
        return builder.fadd(builder.fadd(lanes[0], lanes[1]), builder.fadd(lanes[2], lanes[3]))

    return types.float32(kind, types.int64, types.int64), generate


# One iteration owns 64 rows of the weight, for all rows of x: four, two or one of them at a time. Scales are converted
# to fp32 first; those of values at bit 4 are multiplied by upper_place. offsets: bytes to a step's scales.
@jit
def matmul_quantized_kernel(region, *args):
    (
        kind,
        codes_ptr,
        records_ptr,
        scales_ptr,
        out_ptr,
        rows,
        features,
        groups,
        offsets_ptr,
        steps,
        codes_stride,
        scale_stride,
        out_stride,
        parts,
        upper_place,
        like,
        scale_like,
    ) = args
    rows *= parts
    offsets = array(offsets_ptr, (steps,), np.int64(0))
    scales = np.zeros((ROWS, groups + 2), np.float32)  # past the last there are columns without x
    results = np.empty((4, ROWS, 8), np.float32)
    scale_ptr, stride, last = scales.ctypes.data, 4 * (groups + 2), rows - 1
    to = results.ctypes.data
    a, b, c, d = to, to + ROWS * 32, to + ROWS * 64, to + ROWS * 96
    first_tile, last_tile = enter(region, args)
    while first_tile < last_tile:
        for tile_row in range(first_tile, last_tile):
            first = tile_row * ROWS
            count = min(ROWS, features - first)
            for n in range(count):
                place = np.float32(upper_place) if n & 8 else np.float32(1)
                for group in range(groups):
                    scales[n, group] = load(scales_ptr, (first + n) * scale_stride + group, scale_like) * place
            row = 0
            while row < rows:
                together = min(4 if rows - row > 2 else 2, rows - row)
                results[:together] = np.float32(0)
                for step in range(steps):
                    codes, scale = codes_ptr + tile_row * codes_stride + step * STEP_BYTES, scale_ptr + offsets[step]
                    x, x_stride = records_ptr + step * RECORD, steps * RECORD
                    e, f = x + row * x_stride, x + min(row + 1, last) * x_stride
                    g, h = x + min(row + 2, last) * x_stride, x + min(row + 3, last) * x_stride
                    if together == 1:
                        step_of_one(kind, codes, (e,), scale, stride, (a,))
                    elif together == 2:
                        step_of_two(kind, codes, (e, f), scale, stride, (a, b))
                    else:
                        step_of_four(kind, codes, (e, f, g, h), scale, stride, (a, b, c, d))
                for i in range(0, together, parts):
                    for n in range(count):
                        number = total(kind, to + i * ROWS * 32, n)
                        if parts == 2:
                            number += total(kind, to + (i + 1) * ROWS * 32, n)
                        store(out_ptr, (row + i) // parts * out_stride + first + n, number, like)
                row += together
        first_tile, last_tile = proceed(region)
    return leave(region)


def runs(x: Tensor, scales: Tensor) -> bool:
    """Whether `multiply` takes such tensors."""
    return x.dtype in LIKE and scales.dtype in LIKE and x.numel() > 0 and scales.numel() > 0


def multiply(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """x @ weight^T (+ bias) for packed values of 4 bits (int32) or 8 (int8), symmetric. out: in x's dtype, or fp32."""
    (features, groups), size = scales.shape, x.shape[-1]
    bits = 8 if packed.dtype == torch.int8 else 4
    group_size = size // groups
    kind = INT8 if bits == 8 else INT4_BY_32 if groups > 1 and group_size == 32 else INT4
    columns, steps = 256 // bits, packed.shape[1] * bits // 2
    rows, parts = x.numel() // size, 2 if x.dtype == torch.float32 else 1
    given, target = as_rows("x", x), as_rows("out", out)
    records = np.empty(rows * parts * steps * RECORD, np.uint8)
    launch(
        fixed_point_kernel,
        rows,
        8 * rows * size,
        given.data_ptr(),
        records.ctypes.data,
        PLACES[bits].ctypes.data,
        columns,
        given.stride(0),
        size,
        steps,
        parts,
        LIKE[x.dtype],
    )
    launch(
        matmul_quantized_kernel,
        ceil_div(features, ROWS),
        rows * features * size,
        kind,
        packed.data_ptr(),
        records.ctypes.data,
        scales.data_ptr(),
        target.data_ptr(),
        rows,
        features,
        groups,
        _offsets(steps, columns, group_size, groups).ctypes.data,
        steps,
        packed.stride(0) * packed.itemsize,
        scales.stride(0),
        target.stride(0),
        parts,
        1 / 16 if bits == 4 else 1.0,
        LIKE[out.dtype],
        LIKE[scales.dtype],
    )
    if bias is not None:
        target += bias


@lru_cache(64)
def _offsets(steps: int, columns: int, group_size: int, groups: int) -> np.ndarray:
    """Bytes from the first scale of a row, in fp32, to that of each step; past the last scale for columns without x."""
    return 4 * np.minimum(np.arange(steps) * columns // group_size, groups)
