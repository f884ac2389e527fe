"""8-bit weights with a scale for each group of a row: layout, rounding, matmul.

weight = value * scale, with values from -128 to 127. A group is 32, 64 or 128 columns, or a whole row.

Layout of packed int8 [ceil(N / 64), ceil(K / 128), 4, 128, 16]: tiles of 64 rows and 128 columns, in quarters of 32
columns, each 2 KiB contiguous. It is the order in which the 128 threads of four warps hold the left operand of an
8-bit matrix instruction (mma m16n8k32, wgmma m64k32), so that a thread's 16 bytes, one 128-bit load, are its operand
of one. Byte 4 * (2 c + r) + i of lane l, w = l / 32, g = l / 4 % 8, q = l % 4, holds the value of

    row 16 w + 8 r + g and column 16 c + 4 q + i of the quarter, for c and r of 0 and 1, i of 0 to 3,

so that each word is four neighbours in a row. The same bytes serve 16-bit instructions (m16n8k16), two for each 8-bit
one: a word's lower and upper pair, h of 0 and 1, are where such an instruction expects columns 2 q + e and
8 + 2 q + e, so that x must be permuted to match, column 4 q + 2 h + e to column 8 h + 2 q + e of 16.
Rows and columns past N and K are padded with 0; kernels must mask x in these columns and store none of these rows.
Source: the fragments are those of the PTX manual, "Matrix Fragments for mma.m16n8k32"; weights stored in that order:
Frantar et al., MARLIN (2024).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllama.kernels.reference.int4 import COLUMNS, ROWS
from fastllama.kernels.reference.matmul import matmul
from fastllama.kernels.reference.numerics import wide

LARGEST = 127  # magnitude after rounding

# Dimensions of the matrix [tile, w, r, g | tile, quarter, c, q, i] in the order of bytes [tile, tile, quarter, w, g, q,
# c, r, i], and back.
_BYTES = (0, 4, 5, 1, 3, 7, 6, 2, 8)
_MATRIX = (0, 3, 7, 4, 1, 2, 6, 5, 8)


def packed_shape(rows: int, columns: int) -> tuple[int, int, int, int, int]:
    """The shape of a packed matrix [rows, columns]."""
    return -(-rows // ROWS), -(-columns // COLUMNS), 4, 128, 16


def pack_int8(codes: Tensor) -> Tensor:
    """`codes` [N, K] int8 -> packed."""
    shape = packed_shape(*codes.shape)
    tall, broad = shape[:2]
    codes = F.pad(codes, (0, broad * COLUMNS - codes.shape[1], 0, tall * ROWS - codes.shape[0]))
    return codes.view(tall, 4, 2, 8, broad, 4, 2, 4, 4).permute(_BYTES).reshape(shape)


def unpack_int8(packed: Tensor, rows: int, columns: int) -> Tensor:
    """The values [rows, columns] int8 that `pack_int8` packed."""
    tall, broad = packed.shape[:2]
    codes = packed.reshape(tall, broad, 4, 4, 8, 4, 2, 2, 4).permute(_MATRIX)
    return codes.reshape(tall * ROWS, broad * COLUMNS)[:rows, :columns]


def quantize_int8(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """(`codes` [N, K] int8, scales [N, K / group_size] in weight's dtype).

    The largest magnitude of a group becomes 127 or -127. Values are rounded to nearest under the stored, rounded scale.
    """
    values = wide(weight).unflatten(1, (-1, group_size))
    scales = (values.abs().amax(2, keepdim=True) / LARGEST).to(weight.dtype)
    steps = torch.where(scales == 0, 1, wide(scales))
    codes = (values / steps).round().clamp(-LARGEST, LARGEST).to(torch.int8)
    return codes.flatten(1), scales.squeeze(2)


def dequantize_int8(codes: Tensor, scales: Tensor) -> Tensor:
    """value * scale [N, K], computed in at least fp32 and rounded to scales' dtype."""
    groups = wide(scales)
    values = codes.to(groups.dtype).unflatten(1, (groups.shape[1], -1))
    return (values * groups[:, :, None]).flatten(1).to(scales.dtype)


def matmul_int8(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """`matmul` by the dequantized weight, which is not rounded before."""
    codes = unpack_int8(packed, scales.shape[0], x.shape[-1])
    return matmul(x, dequantize_int8(codes, scales.to(wide(x).dtype)), bias, norm, eps, residual, gated)
