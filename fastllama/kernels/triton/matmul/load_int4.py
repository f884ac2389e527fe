"""4-bit weights from memory to the registers of a tensor core's left operand (layout: kernels/reference/int4.py)."""

from __future__ import annotations

import triton
import triton.language as tl


# Quantized values less 8 in dtype, exactly: [64 * TILES, BLOCK_K] of the row tiles `tile`, `tile` + STEP and so on,
# from column `start`. BLOCK_K is 64, all four words of a thread, or 32, two. Tiles past the last repeat the last.
@triton.jit
def load_int4(
    packed_ptr,
    row_stride,
    tile,
    start,
    N: tl.constexpr,
    dtype: tl.constexpr,
    TILES: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    lane, word = tl.arange(0, 128 * TILES)[:, None], tl.arange(0, BLOCK_K // 16)[None, :]
    tile = tl.minimum(tile + lane // 128 * STEP, (N - 1) // 64)
    packed_ptr += start // 64 * 512
    if BLOCK_K == 32:
        packed_ptr += start % 64 // 16
    words = tl.load(packed_ptr + tile * row_stride + (lane % 128 * 4 + word)).to(tl.uint32, bitcast=True)  # [lanes, t]
    first = tl.join(numbers(words, dtype), numbers(words >> 8, dtype))  # [lanes, t, e, h], of r = 0
    second = tl.join(numbers(words >> 4, dtype), numbers(words >> 12, dtype))
    codes = tl.join(first, second).reshape(4 * TILES, 8, 4, BLOCK_K // 16, 2, 2, 2)  # w, g, q, t, e, h, r
    return codes.trans(0, 6, 1, 3, 5, 2, 4).reshape(64 * TILES, BLOCK_K)


# The lowest 4 bits of both halves of words, less 8: [..., 2]. They become the last bits of a 16-bit number whose last
# place is 1 (1024 in fp16, 128 in bf16), so that one exact subtraction converts them.
@triton.jit
def numbers(words, dtype: tl.constexpr):
    half: tl.constexpr = tl.bfloat16 if dtype == tl.bfloat16 else tl.float16
    ONES: tl.constexpr = 0x43004300 if dtype == tl.bfloat16 else 0x64006400
    OFFSET: tl.constexpr = 136.0 if dtype == tl.bfloat16 else 1032.0
    words = words & 0x000F000F | ONES
    low = (words & 0xFFFF).to(tl.uint16).to(half, bitcast=True)
    high = (words >> 16).to(tl.uint16).to(half, bitcast=True)
    return (tl.join(low, high) - OFFSET).to(dtype)
