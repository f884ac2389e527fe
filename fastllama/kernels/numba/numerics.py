"""Extensions of Numba: 16-bit floats, loads and stores by address, an exponential that LLVM can vectorise.

bf16 is carried as uint16, fp16 as int16, float8_e4m3fn as uint8: an argument `like` of that type selects the
conversion of load and store, so that a kernel has one source for every dtype.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastllama.kernels.numba.cache import kept
from fastllama.kernels.numba.vectors import I8, fetch

# The argument of kernels that selects a dtype; every other dtype runs the reference.
LIKE = {torch.float32: np.float32(0), torch.bfloat16: np.uint16(0), torch.float16: np.int16(0)}
CODE_LIKE = {torch.int8: np.int8(0), torch.float8_e4m3fn: np.uint8(0)}  # only stored
INTEGER_LIKE = {torch.int32: np.int32(0), torch.int64: np.int64(0)}
# Sums may be reordered and contracted, which lets LLVM vectorise a dot product; infinities and NaN keep their meaning.
FAST = {"reassoc", "contract"}


def jit(function):
    """A kernel: compiled once for a machine and signature (cache.py); other Python threads go on while it runs.

    Division by zero follows IEEE 754: Python's exception for it would prevent vectorisation.
    """
    return kept(numba.njit(fastmath=FAST, nogil=True, error_model="numpy")(function))


# For functions that kernels call and LLVM must not reassociate, which Numba allows by default where the caller does:
# a * b * c may overflow in one order alone.
as_written = numba.njit(fastmath=False, error_model="numpy")


def _widened(builder, bits, element):
    """The float32 that an element holds."""
    if element == types.uint16:
        wide = builder.shl(builder.zext(bits, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(wide, ir.FloatType())
    if element == types.int16:
        return builder.fpext(builder.bitcast(bits, ir.HalfType()), ir.FloatType())
    return bits


def _narrowed(builder, number, element):
    """A float32 as an element, rounded to nearest even."""
    if element == types.uint16:
        i32 = ir.IntType(32)
        bits = builder.bitcast(number, i32)
        odd = builder.and_(builder.lshr(bits, i32(16)), i32(1))
        rounded = builder.lshr(builder.add(builder.add(bits, i32(0x7FFF)), odd), i32(16))
        is_nan = builder.icmp_unsigned(">", builder.and_(bits, i32(0x7FFFFFFF)), i32(0x7F800000))
        return builder.trunc(builder.select(is_nan, i32(0x7FC0), rounded), ir.IntType(16))
    if element == types.int16:
        return builder.bitcast(builder.fptrunc(number, ir.HalfType()), ir.IntType(16))
    if element == types.int8:
        rounded = builder.fadd(number, ir.Constant(ir.FloatType(), 12582912.0))  # 1.5 * 2^23: the lowest bits are units
        return builder.trunc(builder.bitcast(rounded, ir.IntType(32)), ir.IntType(8))
    if element == types.uint8:
        return _e4m3(builder, number)
    return number


def _e4m3(builder, number):
    """The bits of float8_e4m3fn of a float32 of magnitude up to 448."""
    i32 = ir.IntType(32)
    bits = builder.bitcast(number, i32)
    magnitude = builder.and_(bits, i32(0x7FFFFFFF))
    # from 2^-6 on: rebias exponents from 127 to 7, round away 20 of 23 bits of mantissa
    odd = builder.and_(builder.lshr(magnitude, i32(20)), i32(1))
    normal = builder.lshr(builder.add(builder.add(magnitude, i32(0x7FFFF - (120 << 23))), odd), i32(20))
    # below 2^-6, the bits count units of 2^-9, the last place of 2^14
    shifted = builder.fadd(builder.bitcast(magnitude, ir.FloatType()), ir.Constant(ir.FloatType(), 16384.0))
    small = builder.and_(builder.bitcast(shifted, i32), i32(0xF))
    code = builder.select(builder.icmp_unsigned("<", magnitude, i32(121 << 23)), small, normal)
    sign = builder.and_(builder.lshr(bits, i32(24)), i32(0x80))
    return builder.trunc(builder.or_(code, sign), ir.IntType(8))


def _element_pointer(context, builder, address, index, element):
    return builder.gep(builder.inttoptr(address, context.get_value_type(element).as_pointer()), [index])


@intrinsic
def load(context, address, index, like):
    """Element `index` of the memory at `address` (an integer), as a float32.

    Kernels take addresses and strides, as Triton's do: making a NumPy array of a tensor takes 2 us, and an op has five;
    and Numba drops stores to an array that it considers unused.
    """

    def generate(context, builder, signature, args):
        element = signature.args[2]
        return _widened(builder, builder.load(_element_pointer(context, builder, args[0], args[1], element)), element)

    return types.float32(address, types.int64, like), generate


@intrinsic
def store(context, address, index, value, like):
    """Make a float32, rounded to nearest even, element `index` of the memory at `address`."""

    def generate(context, builder, signature, args):
        element = signature.args[3]
        target = _element_pointer(context, builder, args[0], args[1], element)
        builder.store(_narrowed(builder, args[2], element), target)
        return context.get_dummy_value()

    return types.void(address, types.int64, types.float32, like), generate


@intrinsic
def prefetch(context, address, index, like):
    """Prefetch the cache line of an element. Lines past the end of memory do no harm."""

    def generate(context, builder, signature, args):
        element = _element_pointer(context, builder, args[0], args[1], signature.args[2])
        fetch(builder, builder.bitcast(element, I8.as_pointer()))
        return context.get_dummy_value()

    return types.void(address, types.int64, like), generate


@intrinsic
def rounded(context, value, like):
    """A float32 rounded to the element type of `like`, as a float32."""

    def generate(_, builder, signature, args):
        element = signature.args[1]
        return _widened(builder, _narrowed(builder, args[0], element), element)

    return types.float32(types.float32, like), generate


@intrinsic
def load_integer(context, address, index, like):
    """Element `index` of int32 or int64 memory, as an int64."""

    def generate(context, builder, signature, args):
        number = builder.load(_element_pointer(context, builder, args[0], args[1], signature.args[2]))
        return number if number.type.width == 64 else builder.sext(number, ir.IntType(64))

    return types.int64(address, types.int64, like), generate


@intrinsic
def _pointer(context, address, like):
    """An address as a pointer to elements."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(address, like), generate


@jit
def array(address, shape, like):
    """The contiguous memory at an address as an array, which owns nothing and may be written."""
    return numba.carray(_pointer(address, like), shape)


@intrinsic
def magnitude_bits(context, x):
    """The bits of |x|, a float32, as an int32: of finite numbers they order as the magnitudes do."""

    def generate(_, builder, signature, args):
        i32 = ir.IntType(32)
        return builder.and_(builder.bitcast(args[0], i32), i32(0x7FFFFFFF))

    return types.int32(types.float32), generate


@intrinsic
def _power_of_two(context, n):
    """2^n for a whole float32 n in [-126, 127]. Written in 32 bits: Numba's integers would widen to 64 on the way."""

    def generate(_, builder, signature, args):
        i32 = ir.IntType(32)
        biased = builder.add(builder.fptosi(args[0], i32), i32(127))
        return builder.bitcast(builder.shl(biased, i32(23)), ir.FloatType())

    return types.float32(types.float32), generate


@numba.njit(fastmath=FAST)
def exp(x):
    """exp(x) to 2 ulp, x clamped to [-87, 88]: 2^n times a polynomial in the rest; coefficients of Cephes' expf."""
    given = x
    x = x if x > np.float32(-87.0) else np.float32(-87.0)
    x = x if x < np.float32(88.0) else np.float32(88.0)
    n = np.floor(x * np.float32(1.44269504088896341) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    power = (p * r * r + r + np.float32(1.0)) * _power_of_two(n)
    return power if given == given else given  # NaN stays NaN, which the clamps would hide
