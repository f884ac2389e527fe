"""Quantization of weights to 4 or 8 bits, and packing: bit-identical to the reference, in one pass over memory each."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastllama.kernels import reference
from fastllama.kernels.numba.numerics import (
    LIKE,
    array,
    jit,
    load,
    magnitude_bits,
    rounded,
    store,
)
from fastllama.kernels.numba.pieces import enter, leave, proceed
from fastllama.kernels.numba.threads import Kernel, launch
from fastllama.kernels.reference.int4 import COLUMNS, MIDDLE, ROWS
from fastllama.kernels.reference.int4 import LARGEST as LARGEST_4
from fastllama.kernels.reference.int4 import packed_shape as packed_shape_4
from fastllama.kernels.reference.int8 import LARGEST as LARGEST_8
from fastllama.kernels.reference.int8 import packed_shape as packed_shape_8

OPERATIONS = 16  # for a weight


# One iteration owns a row of the weight. A group's scale is its value of largest magnitude over `divisor`, or, unless
# `signed`, that magnitude over `divisor`.
@jit
def quantize_weight_kernel(region, *args):
    (
        weight_ptr,
        codes_ptr,
        scales_ptr,
        weight_stride,
        features,
        size,
        group_size,
        signed,
        divisor,
        middle,
        low,
        high,
        like,
        code_like,
    ) = args
    codes = array(codes_ptr, (features, size), code_like)
    first, last = enter(region, args)
    while first < last:
        for row in range(first, last):
            for start in range(0, size, group_size):
                at, largest = row * weight_stride + start, np.int32(0)
                for k in range(group_size):
                    largest = max(largest, magnitude_bits(load(weight_ptr, at + k, like)))
                k = 0
                while magnitude_bits(load(weight_ptr, at + k, like)) != largest:
                    k += 1
                most = load(weight_ptr, at + k, like)
                scale = rounded((most if signed else abs(most)) / np.float32(divisor), like)
                store(scales_ptr, (row * size + start) // group_size, scale, like)
                step = scale if scale != np.float32(0) else np.float32(1)
                for k in range(group_size):
                    code = np.rint(load(weight_ptr, at + k, like) / step) + np.float32(middle)
                    codes[row, start + k] = np.int32(min(max(code, np.float32(low)), np.float32(high)))
        first, last = proceed(region)
    return leave(region)


# An iteration owns a row of tiles. `codes`: [N, K]; words: [tiles, tiles, 2, 4, 8, 4, 4], w, g, q and t last.
@jit
def pack_int4_kernel(region, *args):
    codes_ptr, words_ptr, features, size, tall_tiles, broad_tiles = args
    codes = array(codes_ptr, (features, size), np.uint8(0))
    words = array(words_ptr, (tall_tiles, broad_tiles, 2, 4, 8, 4, 4), np.uint32(0))
    block = np.empty((2, COLUMNS), np.uint32)  # the rows r = 0 and 1 of a tile
    first, last = enter(region, args)
    while first < last:
        for tall in range(first, last):
            for broad in range(broad_tiles):
                for w in range(4):
                    for g in range(8):
                        for r in range(2):
                            n = tall * ROWS + 16 * w + 8 * r + g
                            for k in range(COLUMNS):
                                column = broad * COLUMNS + k
                                inside = n < features and column < size
                                block[r, k] = codes[n, column] if inside else np.uint32(MIDDLE)
                        for half in range(2):
                            for q in range(4):
                                for t in range(4):
                                    k = 64 * half + 16 * t + 2 * q
                                    word = np.uint32(0)
                                    for e in range(2):
                                        for h in range(2):
                                            low, high = block[0, k + 8 * h + e], block[1, k + 8 * h + e]
                                            word |= (low | high << np.uint32(4)) << np.uint32(16 * e + 8 * h)
                                    words[tall, broad, half, w, g, q, t] = word
        first, last = proceed(region)
    return leave(region)


# An iteration owns a row of tiles. `codes`: [N, K]; packed: [tiles, tiles, 4, 4, 8, 4, 2, 2, 4], w, g, q, c, r, i last.
@jit
def pack_int8_kernel(region, *args):
    codes_ptr, packed_ptr, features, size, tall_tiles, broad_tiles = args
    codes = array(codes_ptr, (features, size), np.int8(0))
    packed = array(packed_ptr, (tall_tiles, broad_tiles, 4, 4, 8, 4, 2, 2, 4), np.int8(0))
    first, last = enter(region, args)
    while first < last:
        for tall in range(first, last):
            for w in range(4):
                for g in range(8):
                    for r in range(2):
                        n = tall * ROWS + 16 * w + 8 * r + g
                        for broad in range(broad_tiles):
                            for quarter in range(4):
                                for c in range(2):
                                    for q in range(4):
                                        start = broad * COLUMNS + 32 * quarter + 16 * c + 4 * q
                                        for i in range(4):
                                            inside = n < features and start + i < size
                                            code = codes[n, start + i] if inside else np.int8(0)
                                            packed[tall, broad, quarter, w, g, q, c, r, i] = code
        first, last = proceed(region)
    return leave(region)


def quantize_int4(weight: Tensor, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """See kernels.quantize_int4. With zeros, the reference runs."""
    if not symmetric or not _runs(weight):
        return reference.quantize_int4(weight, group_size, symmetric)
    return *_round(weight, group_size, torch.uint8, True, -MIDDLE, MIDDLE, 0, LARGEST_4), None


def quantize_int8(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """See kernels.quantize_int8."""
    if not _runs(weight):
        return reference.quantize_int8(weight, group_size)
    return _round(weight, group_size, torch.int8, False, LARGEST_8, 0, -LARGEST_8, LARGEST_8)


def _runs(weight: Tensor) -> bool:
    return weight.dtype in LIKE and weight.numel() > 0 and weight.stride(1) == 1


def _round(weight: Tensor, group_size: int, dtype: torch.dtype, *how: int) -> tuple[Tensor, Tensor]:
    features, size = weight.shape
    codes = torch.empty(features, size, dtype=dtype, device=weight.device)
    scales = torch.empty(features, size // group_size, dtype=weight.dtype, device=weight.device)
    launch(
        quantize_weight_kernel,
        features,
        OPERATIONS * weight.numel(),
        *(each.data_ptr() for each in (weight, codes, scales)),
        weight.stride(0),
        features,
        size,
        group_size,
        *how,
        LIKE[weight.dtype],
        np.uint8(0) if dtype == torch.uint8 else np.int8(0),
    )
    return codes, scales


def pack_int4(codes: Tensor) -> Tensor:
    """See kernels.pack_int4."""
    packed = torch.empty(packed_shape_4(*codes.shape), dtype=torch.int32, device=codes.device)
    _pack(pack_int4_kernel, codes, packed)
    return packed


def pack_int8(codes: Tensor) -> Tensor:
    """See kernels.pack_int8."""
    packed = torch.empty(packed_shape_8(*codes.shape), dtype=torch.int8, device=codes.device)
    _pack(pack_int8_kernel, codes, packed)
    return packed


def _pack(kernel: Kernel, codes: Tensor, packed: Tensor) -> None:
    codes, (tall, broad) = codes.contiguous(), packed.shape[:2]
    work = OPERATIONS * codes.numel()
    launch(kernel, tall, work, codes.data_ptr(), packed.data_ptr(), *codes.shape, tall, broad)
