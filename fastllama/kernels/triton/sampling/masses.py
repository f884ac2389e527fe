"""A token's weight as an integer, so that sampling compares and sums exactly, in any order.

The weight is exp((x - max) / temperature), in (0, 1]. The bits of that fp32 number, read as an integer, are its key;
keys order tokens as probabilities do. Its mass is the weight in units of 2^-44, rounded down: int64 adds 2^19 of them
exactly, so that a sum depends neither on the programs that share a row nor on the order of their atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST_VOCAB = (1 << 19) - 1

ONE = tl.constexpr(0x3F800000)  # key of weight 1
WHOLE = tl.constexpr(106)  # biased exponent of 2^-21: below it a mass loses the bits under 2^-44


@triton.jit
def load_logits(logits_ptr, row, row_stride, cols, VOCAB: tl.constexpr):
    """Logits of a row in fp32, at columns in any shape; -inf past the vocabulary."""
    return tl.load(logits_ptr + row * row_stride + cols, mask=cols < VOCAB, other=float("-inf")).to(tl.float32)


@triton.jit
def row_peak(peaks_ptr, row, CHUNKS: tl.constexpr, CHUNKS_BLOCK: tl.constexpr):
    """Largest logit of a row, and the sum of exp relative to it; NaN where the row has no distribution."""
    chunk = tl.arange(0, CHUNKS_BLOCK)  # [CHUNKS_BLOCK]
    peaks = tl.load(peaks_ptr + row * 2 * CHUNKS + chunk, mask=chunk < CHUNKS, other=float("-inf"))
    sums = tl.load(peaks_ptr + (row * 2 + 1) * CHUNKS + chunk, mask=chunk < CHUNKS, other=0.0)
    peak = tl.max(peaks, 0)
    return peak, tl.sum(sums * tl.exp(peaks - peak), 0)


@triton.jit
def keys_of(x, peak, temperature):
    # A temperature below 2^-120 leaves only the ties of the largest logit, as 2^-120 does. An infinite one must not
    # make the scale 0, which turns -inf into NaN.
    scale = 1.4426950408889634 / tl.minimum(tl.maximum(temperature, 7.5e-37), 1.2e38)
    return tl.minimum(tl.exp2((x - peak) * scale), 1.0).to(tl.int32, bitcast=True)


@triton.jit
def mantissas_of(keys):
    """Mass of each key as (24 bits, the left shift they need): weights below 2^-21 lose bits under 2^-44."""
    shift = (keys >> 23) - WHOLE
    bits = ((keys & 0x7FFFFF) | 0x800000) >> tl.minimum(tl.maximum(-shift, 0), 31)
    return bits, tl.maximum(shift, 0)


@triton.jit
def masses_of(keys):
    bits, shift = mantissas_of(keys)
    return bits.to(tl.int64) << shift.to(tl.int64)
