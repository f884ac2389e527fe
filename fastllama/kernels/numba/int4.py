"""Products with 4-bit weights in integers: codes are multiplied where they stand, by x in 16-bit fixed point.

x is brought once into the order of the codes (kernels/reference/int4.py), and every 8 or 16 columns, the ones that meet
in one lane of a vector, get an exponent of their own. So 16 products take three instructions (a mask, a product of
pairs, a sum), and a lane's sum is exact. It is -8 times the sum of x before the first code: codes are centred for free.

No sum overflows. A code is at most 15, at bit 0 or 4 of its byte: 240. x is at most 2^15 - 1 in magnitude. A lane adds
16 products in a tile at most, and starts at 8 * 16 times 16 of x: 16 * (240 + 128) * (2^15 - 1) < 2^28.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from fastllama.kernels import cpu
from fastllama.kernels.checks import as_rows
from fastllama.kernels.numba.numerics import LIKE, load, parallel_jit, store, use_threads
from fastllama.kernels.reference.int4 import MIDDLE, ROWS

HALF, HALF_BYTES = 64, 2048  # codes of a tile's half
AHEAD = 4096  # bytes prefetched
# Of x for 64 columns: 64 int16, 8 int32 to start from, 8 fp32 that make sums of lanes numbers.
RECORD = 128 + 32 + 32
LARGEST = 2**15 - 1
# The columns of a record: those of 16 bits of a run, h = 0 and 1 of its first eight words and then of the others.
PLACES = np.array(
    [
        16 * t + 8 * h + 4 * v + 2 * q + e
        for v in (0, 1)
        for h in (0, 1)
        for q in (0, 1)
        for t in range(4)
        for e in (0, 1)
    ]
)

_I8, _I16, _I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)
_PAIRS, _SUMS, _FLOATS = ir.VectorType(_I16, 16), ir.VectorType(_I32, 8), ir.VectorType(ir.FloatType(), 8)


def _splat(kind, value):
    return ir.Constant(kind, [value] * kind.count)


def _at(builder, address, offset, kind):
    """A pointer to `kind`, `offset` bytes on from an address."""
    if isinstance(offset, int):
        offset = address.type(offset)
    return builder.inttoptr(builder.add(address, offset), kind.as_pointer())


def _load(builder, address, offset, kind):
    return builder.load(_at(builder, address, offset, kind), align=1)


def _dot_of_pairs(builder, a, b):
    """The sums of products of neighbours: one instruction on x86 (vpmaddwd)."""
    both = ir.VectorType(_I32, 16)
    product = builder.mul(builder.sext(a, both), builder.sext(b, both))
    even, odd = (
        builder.shuffle_vector(product, product, ir.Constant(_SUMS, [*range(first, 16, 2)])) for first in (0, 1)
    )
    return builder.add(even, odd)


def _broadcast(builder, number):
    vector = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), number, _I32(0))
    return builder.shuffle_vector(vector, vector, _splat(_SUMS, 0))


def _record(builder, address):
    """The vectors of a record: four of x, the sums to start from, the units."""
    x = [_load(builder, address, offset, _PAIRS) for offset in range(0, 128, 32)]
    return x, _load(builder, address, 128, _SUMS), _load(builder, address, 160, _FLOATS)


def _sums_of_run(builder, codes, records):
    """For each of some records, its products with 64 bytes of codes: two features' sums, the second times 16."""
    sums = [[start, builder.shl(start, _splat(_SUMS, 4))] for _, start, _ in records]
    for v in range(2):
        word = _load(builder, codes, 32 * v, _PAIRS)
        for h in range(2):
            if h:
                word = builder.lshr(word, _splat(_PAIRS, 8))
            masked = [builder.and_(word, _splat(_PAIRS, 0xF << 4 * r)) for r in range(2)]
            for (x, _, _), own in zip(records, sums, strict=True):
                for r in range(2):
                    own[r] = builder.add(own[r], _dot_of_pairs(builder, masked[r], x[2 * v + h]))
    return sums


def _half(builder, codes, rows, scales, stride, results, split):
    """Add the products of half a tile with some rows of x to their results, 64 vectors at each address of `results`.

    rows: addresses of records. scales: address of the fp32 scale of the first feature, the next one `stride` bytes on.
    split: whether the last 32 columns have the scale behind.
    """
    i64 = codes.type
    kind = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), *[_I32] * 3])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    # One row's record stays in registers; of more, LLVM must not try.
    kept = [_record(builder, row) for row in rows] if len(rows) == 1 else None
    with cgutils.for_range(builder, i64(4)) as warps, cgutils.for_range(builder, i64(8)) as lanes:
        feature = builder.add(builder.mul(warps.index, i64(16)), lanes.index)
        run = builder.add(builder.mul(warps.index, i64(512)), builder.mul(lanes.index, i64(64)))
        run = builder.add(codes, run)
        builder.call(prefetch, [_at(builder, run, AHEAD, _I8), *map(_I32, (0, 3, 1))])
        records = kept or [_record(builder, row) for row in rows]
        sums = _sums_of_run(builder, run, records)
        for r in range(2):
            scale_at = builder.add(scales, builder.mul(builder.add(feature, i64(8 * r)), stride))
            scale = _broadcast(builder, _load(builder, scale_at, 0, ir.FloatType()))
            if split:
                other = _broadcast(builder, _load(builder, scale_at, 4, ir.FloatType()))
                order = ir.Constant(_SUMS, [0, 1, 10, 11, 4, 5, 14, 15])  # words t of 2 and 3: the last 32 columns
                scale = builder.shuffle_vector(scale, other, order)
            for (_, _, units), result, own in zip(records, results, sums, strict=True):
                to = _at(builder, result, builder.mul(builder.add(feature, i64(8 * r)), i64(32)), _FLOATS)
                number = builder.sitofp(own[r], _FLOATS)
                total = _math(builder, "fmuladd", number, builder.fmul(units, scale), builder.load(to, align=1))
                builder.store(total, to, align=1)


def _half_of(count, split):
    """`_half` for `count` rows."""

    @intrinsic
    def half(context, codes, rows, scales, stride, results):
        def generate(context, builder, signature, args):
            codes, rows, scales, stride, results = args
            rows, results = (cgutils.unpack_tuple(builder, each, count) for each in (rows, results))
            _half(builder, codes, rows, scales, stride, results, split)
            return context.get_dummy_value()

        addresses, i64 = types.UniTuple(types.int64, count), types.int64
        return types.void(i64, addresses, i64, i64, addresses), generate

    return half


half_of_one, half_of_two, half_of_four = (_half_of(count, False) for count in (1, 2, 4))
split_half_of_one, split_half_of_two, split_half_of_four = (_half_of(count, True) for count in (1, 2, 4))


def _math(builder, name, *vectors):
    """A function of LLVM's for vectors of float32."""
    kind = vectors[0].type
    function = ir.FunctionType(kind, [kind] * len(vectors))
    found = cgutils.get_or_insert_function(builder.module, function, f"llvm.{name}.v{kind.count}f32")
    return builder.call(found, vectors)


def _clamped(builder, numbers, low, high):
    """Vectors of float32 brought between two numbers; NaN becomes the higher one."""
    for relation, limit in (("<", _splat(numbers.type, high)), (">", _splat(numbers.type, low))):
        numbers = builder.select(builder.fcmp_ordered(relation, numbers, limit), numbers, limit)
    return numbers


def _every_second(builder, vector, first):
    return builder.shuffle_vector(vector, vector, ir.Constant(_SUMS, [*range(first, 16, 2)]))


def _store_record(builder, address, numbers, units):
    """A record of four vectors of whole float32; returns them as they fit in."""
    total, wide = _splat(_SUMS, 0), ir.VectorType(_I32, 16)
    for i, given in enumerate(numbers):
        whole = builder.fptosi(given, wide)
        for e in range(2):
            total = builder.add(total, _every_second(builder, whole, e))
        builder.store(builder.trunc(whole, _PAIRS), _at(builder, address, 32 * i, _PAIRS), align=1)
    builder.store(builder.mul(total, _splat(_SUMS, -MIDDLE)), _at(builder, address, 128, _SUMS), align=1)
    builder.store(units, _at(builder, address, 160, _FLOATS), align=1)


@intrinsic
def fix(context, x, record, rests, parts):
    """64 float32 at an address, in the order of their codes, as a record; with two parts what rounding took, too."""

    def generate(context, builder, signature, args):
        x, record, rests, parts = args
        kind = ir.VectorType(ir.FloatType(), 16)
        numbers = [_load(builder, x, 64 * i, kind) for i in range(4)]
        largest, spoilt = _splat(kind, 0.0), _splat(kind, 0.0)
        for each in numbers:
            magnitude = _math(builder, "fabs", each)
            largest = builder.select(builder.fcmp_ordered(">", magnitude, largest), magnitude, largest)
            spoilt = builder.fadd(spoilt, builder.fmul(each, _splat(kind, 0.0)))  # NaN of what is not finite
        halves = [_every_second(builder, largest, e) for e in range(2)]
        largest = builder.select(builder.fcmp_ordered(">", *halves), *halves)
        power = builder.and_(builder.bitcast(largest, _SUMS), _splat(_SUMS, 0x7F800000))
        power = _clamped(builder, builder.bitcast(power, _FLOATS), 2.0**-112, 2.0**127)
        twice = ir.Constant(ir.VectorType(_I32, 16), [i // 2 for i in range(16)])
        up = builder.fdiv(_splat(_FLOATS, 2.0**14), power)
        up = builder.shuffle_vector(up, up, twice)
        units = builder.fmul(power, _splat(_FLOATS, 2.0**-14))
        for e in range(2):
            units = builder.fadd(units, _every_second(builder, spoilt, e))
        scaled = [builder.fmul(each, up) for each in numbers]
        wholes = [_clamped(builder, _math(builder, "rint", each), -LARGEST, LARGEST) for each in scaled]
        _store_record(builder, record, wholes, units)
        with builder.if_then(builder.icmp_signed("==", parts, parts.type(2))):
            left = [builder.fsub(*each) for each in zip(scaled, wholes, strict=True)]
            left = [builder.fmul(each, _splat(kind, LARGEST + 1.0)) for each in left]
            left = [_clamped(builder, _math(builder, "rint", each), -LARGEST, LARGEST) for each in left]
            _store_record(builder, rests, left, builder.fmul(units, _splat(_FLOATS, 2.0**-15)))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


# x [rows, size] as integers: a record for each 64 columns. A row of fp32 has twice as many (parts), of which the second
# half is for the rests, in units 2^-15 times as large.
@parallel_jit
def fixed_kernel(x_ptr, records, rows, x_stride, size, halves, parts, like):
    for m in numba.prange(rows):
        row = np.int64(m)
        z = np.empty(HALF, np.float32)
        for half in range(halves):
            at = row * x_stride + half * HALF
            left = size - half * HALF
            for i in range(HALF):
                z[i] = load(x_ptr, at + PLACES[i], like) if PLACES[i] < left else np.float32(0)
            record = records + (row * parts * halves + half) * RECORD
            fix(z.ctypes.data, record, record + halves * RECORD, parts)


# One iteration owns a row of tiles, 64 features, for all rows of x: four, two or one of them at a time.
@parallel_jit
def products_kernel(
    words_ptr,
    records_ptr,
    rows,
    scales_ptr,
    out_ptr,
    features,
    groups,
    halves,
    group_size,
    words_stride,
    scale_stride,
    out_stride,
    parts,
    like,
    scale_like,
):
    rows *= parts
    scale_offsets = np.zeros(halves, np.int64)
    for half in range(halves):
        scale_offsets[half] = 4 * (half * HALF // group_size) if groups > 1 else 0
    for tile_row in numba.prange((features + ROWS - 1) // ROWS):
        first = np.int64(tile_row) * ROWS
        scales = np.zeros((ROWS, groups + 3), np.float32)
        for n in range(min(ROWS, features - first)):
            place = np.float32(1 / 16) if n & 8 else np.float32(1)
            for group in range(groups):
                scales[n, group] = load(scales_ptr, (first + n) * scale_stride + group, scale_like) * place
        results = np.empty((4, ROWS, 8), np.float32)
        results_ptr, scales_at = results.ctypes.data, scales.ctypes.data
        a, b, c, d = results_ptr, results_ptr + 2048, results_ptr + 4096, results_ptr + 6144
        row = 0
        while row < rows:
            count = min(4 if rows - row > 2 else 2, rows - row)
            results[:count] = np.float32(0)
            last = rows - 1
            for half in range(halves):
                codes = words_ptr + np.int64(tile_row) * words_stride + half * HALF_BYTES
                scale = scales_at + scale_offsets[half]
                x = records_ptr + half * RECORD
                step = halves * RECORD
                e, f = x + row * step, x + min(row + 1, last) * step
                g, h = x + min(row + 2, last) * step, x + min(row + 3, last) * step
                s = 4 * (groups + 3)
                if groups > 1 and group_size == 32:
                    if count == 1:
                        split_half_of_one(codes, (e,), scale, s, (a,))
                    elif count == 2:
                        split_half_of_two(codes, (e, f), scale, s, (a, b))
                    else:
                        split_half_of_four(codes, (e, f, g, h), scale, s, (a, b, c, d))
                elif count == 1:
                    half_of_one(codes, (e,), scale, s, (a,))
                elif count == 2:
                    half_of_two(codes, (e, f), scale, s, (a, b))
                else:
                    half_of_four(codes, (e, f, g, h), scale, s, (a, b, c, d))
            for i in range(0, count, parts):
                for n in range(min(ROWS, features - first)):
                    total = np.float32(0)
                    for lane in range(8):
                        total += results[i, n, lane]
                        if parts == 2:
                            total += results[i + 1, n, lane]
                    m = (row + i) // parts
                    store(out_ptr, m * out_stride + first + n, total, like)
            row += count


def matmul_int4(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    workspace: Tensor | None,
) -> None:
    """See kernels.matmul_int4. Zeros are the other CPU implementation's."""
    (features, groups), size = scales.shape, x.shape[-1]
    like, scale_like = LIKE.get(x.dtype), LIKE.get(scales.dtype)
    rows = x.numel() // size
    if zeros is not None or like is None or scale_like is None or not rows * features:
        cpu.matmul_int4(x, packed, scales, zeros, bias, out, workspace)
        return
    given, target = as_rows("x", x), as_rows("out", out)
    parts = 2 if x.dtype == torch.float32 else 1
    halves = 2 * packed.shape[1]
    records = np.empty(rows * parts * halves * RECORD, np.uint8)
    use_threads(rows * features * size)
    fixed_kernel(given.data_ptr(), records.ctypes.data, rows, given.stride(0), size, halves, parts, like)
    products_kernel(
        packed.data_ptr(),
        records.ctypes.data,
        rows,
        scales.data_ptr(),
        target.data_ptr(),
        features,
        groups,
        halves,
        size // groups,
        4 * packed.stride(0),
        scales.stride(0),
        target.stride(0),
        parts,
        like,
        scale_like,
    )
    if bias is not None:
        target += bias
