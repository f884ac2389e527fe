"""Quantization of fp32 to 8 bits under a scale, for kernels that write quantized keys and values, or rows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer, to nearest even, in the lowest bits
SMALLEST_BITS = tl.constexpr((127 - 100) << 23)  # of 2^-100: its reciprocal and those of larger numbers are finite


def as_scales(name: str, scales: Tensor) -> Tensor:
    """`scales` [...] of rows, unchanged. Raises ValueError unless they are contiguous, because nothing is copied."""
    if not scales.is_contiguous():
        raise ValueError(f"{name} has strides {list(scales.stride())}; legal for the Triton kernel: contiguous")
    return scales


# Both halves [HEADS, PAIRS] of heads in fp32, quantized, and each head's scale [HEADS, 1]: absmax / largest value.
# Heads that hold an infinity or a NaN get zeros and that scale. dtype: int8, or uint8 for the bits of float8_e4m3fn.
@triton.jit
def quantized(first, second, dtype: tl.constexpr):
    LARGEST: tl.constexpr = 127.0 if dtype == tl.int8 else 448.0
    absmax = largest(tl.maximum(magnitude_bits(first), magnitude_bits(second)))  # [HEADS, 1]
    finite = absmax < float("inf")
    full = tl.full(absmax.shape, LARGEST, tl.float32)
    inverse, scales = tl.div_rn(full, absmax), tl.div_rn(absmax, full)  # a division after `encoded` spills on sm_100
    first = encoded(tl.where(finite, first * inverse, 0.0), dtype)
    second = encoded(tl.where(finite, second * inverse, 0.0), dtype)
    return first, second, scales


# x in fp32, quantized under a given scale; larger quotients give the largest value. e4m3fn has its NaN where 480 would
# be; int8 has none, and gets 0.
@triton.jit
def quantized_by(scale, x, dtype: tl.constexpr):
    LARGEST: tl.constexpr = 127.0 if dtype == tl.int8 else 448.0
    NAN_AS: tl.constexpr = 0.0 if dtype == tl.int8 else 480.0
    quotient = tl.div_rn(x, tl.full(x.shape, scale, tl.float32))
    within = tl.minimum(tl.maximum(quotient, -LARGEST), LARGEST)
    return encoded(tl.where(quotient == quotient, within, NAN_AS), dtype)


# Stores rows [ROWS, SIZE] in fp32, or one [SIZE], as int8, and each row's scale at scale_ptrs [ROWS, 1]; see above.
@triton.jit
def store_quantized(out_ptrs, scale_ptrs, x, mask, row_mask):
    absmax = largest(magnitude_bits(x))  # [ROWS, 1]
    full = tl.full(absmax.shape, 127.0, tl.float32)
    inverse = tl.div_rn(full, absmax)
    tl.store(out_ptrs, encoded(tl.where(absmax < float("inf"), x * inverse, 0.0), tl.int8), mask=mask)
    tl.store(scale_ptrs, tl.div_rn(absmax, full), mask=row_mask)


# As integers, the bits of magnitudes have the order of the numbers, then infinity, then NaN, which tl.max loses.
@triton.jit
def magnitude_bits(x):
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def largest(bits):
    LAST: tl.constexpr = len(bits.shape) - 1
    return tl.max(tl.maximum(bits, SMALLEST_BITS), LAST, keep_dims=True).to(tl.float32, bitcast=True)


@triton.jit
def encoded(x, dtype: tl.constexpr):
    return (x + MAGIC).to(tl.int32, bitcast=True).to(tl.int8) if dtype == tl.int8 else e4m3(x)


# The bits of float8_e4m3fn of x, at most 448 in magnitude, rounded to nearest even. In integers, because sm_80 and
# gfx942 have no instruction for it.
@triton.jit
def e4m3(x):
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # from 2^-6 on: rebias exponents from 127 to 7, round away 20 of 23 bits of mantissa
    normal = (magnitude - (120 << 23) + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20
    # below 2^-6, the bits count units of 2^-9, the last place of 2^14
    small = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) & 0xF
    code = tl.where(magnitude < (121 << 23), small, normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)
