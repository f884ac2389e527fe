"""8-bit weights from memory to the registers of a tensor core's left operand (layout: kernels/reference/int8.py).

Their columns are in another order than x's (`order`), and on NVIDIA they are divided by a `unit`: a value plus 128, as
the lowest byte of 16 bits, is that many times the smallest number of bf16 or fp16, even where it reaches into the
exponent; one exact multiplication and addition makes value / unit of it. So a value takes 1.25 instructions: half a
`spread`, half of the arithmetic of `pair`, a quarter of the addition of 128.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllama.kernels.launch.device import arch


def unit(x: Tensor) -> int:
    """The divisor of the values that `load_int8` returns for x's dtype: a power of two; 1 without NVIDIA's assembly."""
    if not arch(x.device).startswith("sm_"):
        return 1
    return 64 if x.dtype == torch.bfloat16 else 512


# The column at place k of a matrix instruction: of a word's four columns, the upper two are in another register.
@triton.jit
def order(k):
    return k // 16 * 16 + k // 2 % 4 * 4 + k // 8 % 2 * 2 + k % 2


# Quantized values / UNIT in dtype, exactly: [64 * TILES, BLOCK_K] of the same tiles as in `load_int4`, from column
# `start`. BLOCK_K is a multiple of 32; if ORDERED, columns are in `order`.
@triton.jit
def load_int8(
    packed_ptr,
    row_stride,
    tile,
    start,
    N: tl.constexpr,
    dtype: tl.constexpr,
    TILES: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNIT: tl.constexpr,
    ORDERED: tl.constexpr,
):
    QUARTERS: tl.constexpr = BLOCK_K // 32
    lane = tl.arange(0, 128 * TILES)[:, None, None]
    quarter, word = tl.arange(0, QUARTERS)[None, :, None], tl.arange(0, 4)[None, None, :]
    tile = tl.minimum(tile + lane // 128 * STEP, (N - 1) // 64)
    packed_ptr += start // 32 * 512
    words = tl.load(packed_ptr + tile * row_stride + (quarter * 512 + lane % 128 * 4 + word))  # [lanes, quarter, cr]
    words = words.to(tl.uint32, bitcast=True)
    if UNIT == 1:
        low = tl.join(number(words, dtype), number(words >> 8, dtype))
        high = tl.join(number(words >> 16, dtype), number(words >> 24, dtype))
    else:
        words = words ^ 0x80808080  # value + 128
        low, high = pair(spread(words, "0x4140"), dtype, UNIT), pair(spread(words, "0x4342"), dtype, UNIT)
    codes = tl.join(low, high).reshape(4 * TILES, 8, 4, QUARTERS, 2, 2, 2, 2)  # w, g, q, quarter, c, r, e, h
    codes = codes.trans(0, 5, 1, 3, 4, 7, 2, 6) if ORDERED else codes.trans(0, 5, 1, 3, 4, 2, 7, 6)
    return codes.reshape(64 * TILES, BLOCK_K)


# The lowest byte of words, a signed integer. bf16 holds all of its 8 bits, as the upper half of its fp32.
@triton.jit
def number(words, dtype: tl.constexpr):
    value = words.to(tl.uint8).to(tl.int8, bitcast=True).to(tl.float32)
    if dtype == tl.bfloat16:
        value = (value.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(dtype)


# Two of a word's bytes, each in 16 bits.
@triton.jit
def spread(words, BYTES: tl.constexpr):
    ASSEMBLY: tl.constexpr = "prmt.b32 $0, $1, 0, " + BYTES + ";"
    return tl.inline_asm_elementwise(ASSEMBLY, "=r,r", [words], dtype=tl.uint32, is_pure=True, pack=1)


# Both halves of words, 0 to 255, less 128, over UNIT: [..., 2].
@triton.jit
def pair(words, dtype: tl.constexpr, UNIT: tl.constexpr):
    half: tl.constexpr = tl.bfloat16 if dtype == tl.bfloat16 else tl.float16
    SMALLEST: tl.constexpr = 2.0**-133 if dtype == tl.bfloat16 else 2.0**-24
    FACTOR: tl.constexpr = 1 / SMALLEST / UNIT
    OFFSET: tl.constexpr = 128 / UNIT
    low = (words & 0xFFFF).to(tl.uint16).to(half, bitcast=True)
    high = (words >> 16).to(tl.uint16).to(half, bitcast=True)
    return (tl.join(low, high) * FACTOR - OFFSET).to(dtype)
