"""Load, rotation and store of a head as pairs of dimensions, (first, second), that are rotated together.

Every element is read once, by the program that writes it, so that a rotation may be in place. Dimensions past the
rotary ones are paired as well, and pass through.
"""

from __future__ import annotations

import triton
import triton.language as tl


# Half-split pairs are (i, i + ROTARY / 2); those past the rotary ones follow, half of them apart, rounded up.
@triton.jit
def half_split(pair, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr):
    first, second = pair, pair + HEAD_DIM // 2
    if ROTARY < HEAD_DIM:
        turns = pair < ROTARY // 2
        first = tl.where(turns, pair, pair + ROTARY // 2)
        second = pair + tl.where(turns, ROTARY // 2, (HEAD_DIM + 1) // 2)
    return first, second


# Pairs [HEADS, PAIRS] in fp32 of the heads at x_ptr + start, start [HEADS, 1]; zeros where mask [HEADS, 1] is unset.
@triton.jit
def load_pairs(
    x_ptr,
    start,
    mask,
    HEAD_DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    if INTERLEAVED:
        dim = tl.arange(0, 2 * PAIRS)[None, :]  # [1, 2 * PAIRS]
        x = tl.load(x_ptr + start + dim, mask=mask & (dim < HEAD_DIM), other=0.0)
        first, second = tl.split(tl.reshape(x, (start.shape[0], PAIRS, 2)))
    else:
        pair = tl.arange(0, PAIRS)[None, :]  # [1, PAIRS]
        dim, other_dim = half_split(pair, HEAD_DIM, ROTARY)
        first = tl.load(x_ptr + start + dim, mask=mask & (pair < (HEAD_DIM + 1) // 2), other=0.0)
        second = tl.load(x_ptr + start + other_dim, mask=mask & (other_dim < HEAD_DIM), other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


# The inverse of load_pairs, for pairs in x's dtype.
@triton.jit
def store_pairs(
    x_ptr,
    start,
    mask,
    first,
    second,
    HEAD_DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    if INTERLEAVED:
        dim = tl.arange(0, 2 * PAIRS)[None, :]  # [1, 2 * PAIRS]
        x = tl.reshape(tl.join(first, second), (start.shape[0], 2 * PAIRS))
        tl.store(x_ptr + start + dim, x, mask=mask & (dim < HEAD_DIM))
    else:
        pair = tl.arange(0, PAIRS)[None, :]  # [1, PAIRS]
        dim, other_dim = half_split(pair, HEAD_DIM, ROTARY)
        tl.store(x_ptr + start + dim, first, mask=mask & (pair < (HEAD_DIM + 1) // 2))
        tl.store(x_ptr + start + other_dim, second, mask=mask & (other_dim < HEAD_DIM))


# Pairs [HEADS, PAIRS] rotated by the angles at angles_ptr, one position's row of the cos/sin cache. A position outside
# the cache gives NaN, and nothing is read.
@triton.jit
def rotated(first, second, angles_ptr, exists, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr, PAIRS: tl.constexpr):
    pair = tl.arange(0, PAIRS)[None, :]  # [1, PAIRS]
    turns = pair < ROTARY // 2
    cos = tl.load(angles_ptr + pair, mask=turns & exists, other=tl.where(exists, 1.0, float("nan")))
    sin = tl.load(angles_ptr + ROTARY // 2 + pair, mask=turns & exists, other=0.0)
    cos, sin = cos.to(tl.float32), sin.to(tl.float32)
    first_turned, second_turned = first * cos - second * sin, second * cos + first * sin
    if ROTARY < HEAD_DIM:  # sin = 0 alone would not do: 0 * inf is NaN
        first_turned = tl.where(turns, first_turned, first)
        second_turned = tl.where(turns, second_turned, second)
    return first_turned, second_turned
