"""4-bit weights with a scale, and optionally a zero, for each group of a row: layout, rounding, matmul.

weight = (value - zero) * scale, with values from 0 to 15, and zero 8 without a tensor of zeros. A group is 32, 64 or
128 columns, or a whole row.

Layout of packed int32 [ceil(N / 64), ceil(K / 128), 2, 128, 4]: tiles of 64 rows and 128 columns, in halves of 64
columns, each 2 KiB contiguous. It is the order in which the 128 threads of four warps hold the left operand of a
matrix instruction (mma m16n8k16, wgmma m64k16), so that a thread's 4 words, one 128-bit load, are its operands of four
instructions. Word t of lane l, w = l / 32, g = l / 4 % 8, q = l % 4, holds the values of

    rows 16 w + 8 r + g and columns 16 t + 8 h + 2 q + e of the half at bit 16 e + 8 h + 4 r, for e, h, r of 0 and 1,

so that `word >> 4 * (2 h + r) & 0x000F000F` is a pair of neighbours in a row. Rows and columns past N and K are padded
with 8; kernels must mask x in these columns and store none of these rows.
Source: the fragments are those of the PTX manual, "Matrix Fragments for mma.m16n8k16"; weights stored in that order:
Frantar et al., MARLIN (2024).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllama.kernels.reference.matmul import matmul
from fastllama.kernels.reference.numerics import wide

ROWS, COLUMNS = 64, 128  # of a tile
GROUPS = (32, 64, 128)  # sizes, besides all of a row
MIDDLE = 8  # the zero without a tensor of zeros, and the padding
LARGEST = 15

# Pairs of values, of r = 0 and r = 1, as dimensions of the matrix [tile, w, g | tile, half, t, h, q, e] and in the
# order of bytes [tile, tile, half, w, g, q, t, e, h], the lowest byte of a word first.
_BYTES = (0, 3, 4, 1, 2, 7, 5, 8, 6)
_MATRIX = (0, 3, 4, 1, 2, 6, 8, 5, 7)


def packed_shape(rows: int, columns: int) -> tuple[int, int, int, int, int]:
    """The shape of a packed matrix [rows, columns]."""
    return -(-rows // ROWS), -(-columns // COLUMNS), 2, 128, 4


def pack_int4(codes: Tensor) -> Tensor:
    """`codes` [N, K] uint8, 0 to 15 -> packed."""
    tall, broad = packed_shape(*codes.shape)[:2]
    codes = F.pad(codes, (0, broad * COLUMNS - codes.shape[1], 0, tall * ROWS - codes.shape[0]), value=MIDDLE)
    low, high = codes.reshape(tall, 4, 2, 8, broad * COLUMNS).unbind(2)
    pairs = (low | high << 4).view(tall, 4, 8, broad, 2, 4, 2, 4, 2)  # tile, w, g, tile, half, t, h, q, e
    return pairs.permute(_BYTES).reshape(tall, broad, 2, 128, 16).view(torch.int32)


def unpack_int4(packed: Tensor, rows: int, columns: int) -> Tensor:
    """The values [rows, columns] uint8 that `pack_int4` packed."""
    tall, broad = packed.shape[:2]
    pairs = packed.view(torch.uint8).reshape(tall, broad, 2, 4, 8, 4, 4, 2, 2)
    pairs = pairs.permute(_MATRIX).reshape(tall, 4, 8, broad * COLUMNS)
    codes = torch.stack((pairs & LARGEST, pairs >> 4), 2)
    return codes.view(tall * ROWS, broad * COLUMNS)[:rows, :columns]


def quantize_int4(weight: Tensor, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """(`codes` [N, K] uint8, scales [N, K / group_size] in weight's dtype, zeros uint8 like scales or None).

    Symmetric: the value of the largest magnitude becomes 0, whichever its sign. Otherwise 0 to 15 span the group's
    minimum, its maximum and 0. Values are rounded to nearest under the stored, rounded scale.
    """
    values = wide(weight).unflatten(1, (-1, group_size))
    if symmetric:
        most = values.gather(2, values.abs().argmax(2, keepdim=True))
        scales = (most / -MIDDLE).to(weight.dtype)
    else:
        least, most = (getattr(values, name)(2, keepdim=True).clamp(**{side: 0}) for name, side in _ENDS)
        scales = ((most - least) / LARGEST).to(weight.dtype)
    steps = torch.where(scales == 0, 1, wide(scales))
    zeros = torch.full_like(steps, MIDDLE) if symmetric else (-least / steps).round().clamp(0, LARGEST)
    codes = ((values / steps).round() + zeros).clamp(0, LARGEST).to(torch.uint8)
    return codes.flatten(1), scales.squeeze(2), None if symmetric else zeros.squeeze(2).to(torch.uint8)


_ENDS = (("amin", "max"), ("amax", "min"))


def dequantize_int4(codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
    """(value - zero) * scale [N, K], computed in at least fp32 and rounded to scales' dtype."""
    groups = wide(scales)
    values = codes.to(groups.dtype).unflatten(1, (groups.shape[1], -1))
    values = values - (MIDDLE if zeros is None else zeros.to(groups.dtype)[:, :, None])
    return (values * groups[:, :, None]).flatten(1).to(scales.dtype)


def matmul_int4(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """`matmul` by the dequantized weight, which is not rounded before."""
    codes = unpack_int4(packed, scales.shape[0], x.shape[-1])
    weight = dequantize_int4(codes, scales.to(wide(x).dtype), zeros)
    return matmul(x, weight, bias, norm, eps, residual, gated)
