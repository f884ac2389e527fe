"""x in 16-bit fixed point, in the order of a weight's packed values, for the integer matmuls of quantized.py.

A record is a step's 64 numbers of x. The eight of them in one lane of a vector share an exponent.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastllama.kernels.numba.numerics import array, jit, load
from fastllama.kernels.numba.pieces import enter, leave, proceed
from fastllama.kernels.numba.vectors import FLOATS, PAIRS, WIDE, WORDS, at, every_second, math, read, splat
from fastllama.kernels.reference.int4 import MIDDLE

RECORD = 4 * 32 + 32 + 32  # bytes of x for a step: 64 int16, 8 int32 to start from, 8 fp32 units of the sums
LARGEST = 2**15 - 1


def _clamped(builder, numbers, low, high):
    """Vectors of float32 clamped to [low, high]; NaN becomes `high`."""
    for relation, limit in (("<", splat(numbers.type, high)), (">", splat(numbers.type, low))):
        numbers = builder.select(builder.fcmp_ordered(relation, numbers, limit), numbers, limit)
    return numbers


def _store_record(builder, address, numbers, units):
    """Store a record of four vectors of whole float32 that fit in int16."""
    total = splat(WORDS, 0)
    for i, given in enumerate(numbers):
        whole = builder.fptosi(given, WIDE)
        for e in range(2):
            total = builder.add(total, every_second(builder, whole, e))
        builder.store(builder.trunc(whole, PAIRS), at(builder, address, 32 * i, PAIRS), align=1)
    builder.store(builder.mul(total, splat(WORDS, -MIDDLE)), at(builder, address, 128, WORDS), align=1)
    builder.store(units, at(builder, address, 160, FLOATS), align=1)


@intrinsic
def fix(context, x, record, rests, parts):
    """Store 64 float32, in the order of packed values, as a record; with two parts also their rounding errors."""

    def generate(context, builder, signature, args):
        x, record, rests, parts = args
        kind = ir.VectorType(ir.FloatType(), 16)
        numbers = [read(builder, x, 64 * i, kind) for i in range(4)]
        largest, spoilt = splat(kind, 0.0), splat(kind, 0.0)
        for each in numbers:
            magnitude = math(builder, "fabs", each)
            largest = builder.select(builder.fcmp_ordered(">", magnitude, largest), magnitude, largest)
            spoilt = builder.fadd(spoilt, builder.fmul(each, splat(kind, 0.0)))  # NaN for an infinity or NaN
        halves = [every_second(builder, largest, e) for e in range(2)]
        largest = builder.select(builder.fcmp_ordered(">", *halves), *halves)
        power = builder.and_(builder.bitcast(largest, WORDS), splat(WORDS, 0x7F800000))
        power = _clamped(builder, builder.bitcast(power, FLOATS), 2.0**-112, 2.0**127)
        twice = ir.Constant(WIDE, [i // 2 for i in range(16)])
        up = builder.fdiv(splat(FLOATS, 2.0**14), power)
        up = builder.shuffle_vector(up, up, twice)
        units = builder.fmul(power, splat(FLOATS, 2.0**-14))
        for e in range(2):
            units = builder.fadd(units, every_second(builder, spoilt, e))
        scaled = [builder.fmul(each, up) for each in numbers]
        wholes = [_clamped(builder, math(builder, "rint", each), -LARGEST, LARGEST) for each in scaled]
        _store_record(builder, record, wholes, units)
        with builder.if_then(builder.icmp_signed("==", parts, parts.type(2))):
            left = [builder.fsub(*each) for each in zip(scaled, wholes, strict=True)]
            left = [builder.fmul(each, splat(kind, LARGEST + 1.0)) for each in left]
            left = [_clamped(builder, math(builder, "rint", each), -LARGEST, LARGEST) for each in left]
            _store_record(builder, rests, left, builder.fmul(units, splat(FLOATS, 2.0**-15)))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


# x [rows, size] as integers: a record for each step. A row of fp32 has twice as many (parts), of which the second half
# holds the rounding errors, in units 2^-15 times as large.
@jit
def fixed_point_kernel(region, *args):
    x_ptr, records_ptr, places_ptr, columns, x_stride, size, steps, parts, like = args
    places, x = array(places_ptr, (64,), np.int64(0)), np.empty(64, np.float32)
    first, last = enter(region, args)
    while first < last:
        for row in range(first, last):
            for step in range(steps):
                start, left = row * x_stride + step * columns, size - step * columns
                for i in range(64):
                    x[i] = load(x_ptr, start + places[i], like) if places[i] < left else np.float32(0)
                record = records_ptr + (row * parts * steps + step) * RECORD
                fix(x.ctypes.data, record, record + steps * RECORD, parts)
        first, last = proceed(region)
    return leave(region)
