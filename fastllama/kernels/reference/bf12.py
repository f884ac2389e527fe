"""bf16 weights in 12 bits without loss, for matmuls that are bound by the memory traffic of the weight.

The exponents of a weight matrix cluster just below the largest: 15 consecutive exponents of 256 cover all but about one
value in ten thousand. So a weight is stored as sign, 7 bits of mantissa and a 4-bit index c of its exponent: c > 0 is
the exponent `exponent + c - 1`, c = 0 is zero. All other values are stored separately, as outliers.

Layout of `codes` [N, K * 3 / 2] uint8: 96 bytes for each 64 weights of a row.
    bytes 0 to 63: the low bit of c, above the mantissa: the low byte of a bf16 number.
    bytes 64 to 95: sign and the upper 3 bits of c, in bits 7 and 2 to 0 for weights 0 to 31 (as in the high byte of a
    bf16 number), in bits 3 and 6 to 4 for weights 32 to 63.
Each group of 32 weights is stored in the order in which interleaving its low and high bytes in 128-bit halves returns
four vectors of 8 words, whose upper 16 bits are weights 0 to 7, 8 to 15 and so on: see `_interleaved`.
Source: exponents of weights compress well: Zhang et al., 70% Size, 100% Accuracy: DFloat11 (2025); here at a fixed
width, so that a vector unit decodes them faster than memory delivers them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastllama.kernels.reference.matmul import matmul

BLOCK = 64  # weights of a row that are packed together
BLOCK_BYTES = 96
CODES = 15  # exponents with an index: 1 to 15
LARGEST_EXPONENT = 127  # of index 1, so that 2^(exponent - 1) is finite in fp32
SAMPLE = 256  # rows from which the exponents are chosen
NAN = 0x7FC0  # bits of bf16


def pack_bf12(weight: Tensor) -> tuple[Tensor, Tensor, int]:
    """weight [N, K] bf16, K a multiple of 64 -> (`codes` [N, K * 3 / 2] uint8, outliers [M, 3] int32, exponent).

    exponent: the biased exponent of index 1. outliers: row, column and the bits of the value in fp32, in order.
    """
    exponent = commonest_exponent(weight)
    bits = weight.view(torch.int16)
    code = (bits >> 7 & 0xFF) - (exponent - 1)
    fits = (code >= 1) & (code <= CODES)
    code = torch.where(fits, code, 0)
    low = (code & 1) << 7 | torch.where(fits, bits & 0x7F, 0)
    high = (bits >> 8 & 0x80) | code >> 1
    low, high = (_interleaved(part.to(torch.uint8)) for part in (low, high))  # [N, K / 64, 2, 32]
    first, second = high.split(1, 2)
    codes = torch.cat((low, first | second << 4 | second >> 4), 2).flatten(1)
    rows, columns = torch.nonzero(~fits & (bits & 0x7FFF != 0), as_tuple=True)
    return codes, torch.stack((rows, columns, bits[rows, columns].long() << 16), 1).int(), exponent


def commonest_exponent(weight: Tensor) -> int:
    """The first of the 15 consecutive exponents that cover most of a bf16 matrix, by a sample of its rows."""
    sample = weight[:: max(1, weight.shape[0] // SAMPLE)]
    exponents = (sample.view(torch.int16) >> 7 & 0xFF).flatten().int()
    counts = torch.bincount(exponents, minlength=256)[1 : LARGEST_EXPONENT + CODES]
    return int(counts.unfold(0, CODES, 1).sum(-1).argmax()) + 1


def unpack_bf12(codes: Tensor, outliers: Tensor, exponent: int) -> Tensor:
    """The bf16 weight [N, K] that `pack_bf12` took, bit for bit.

    An outlier whose row does not exist is ignored; one whose column does not exist makes its row NaN.
    """
    features, row_bytes = codes.shape
    blocks = codes.view(features, row_bytes // BLOCK_BYTES, 3, BLOCK // 2)
    low, both = blocks[:, :, :2], blocks[:, :, 2]
    high = torch.stack((both, both << 4 | both >> 4), 2)
    low, high = (_in_order(part).to(torch.int16) for part in (low, high))  # [N, K]
    code = (high & 7) << 1 | low >> 7
    exponents = torch.where(code > 0, code + (exponent - 1), 0)
    bits = high << 8 & -0x8000 | exponents << 7 | low & 0x7F
    outliers = outliers[(outliers[:, 0] >= 0) & (outliers[:, 0] < features)]
    exists = (outliers[:, 1] >= 0) & (outliers[:, 1] < bits.shape[1])
    rows, columns, values = outliers[exists].unbind(1)
    bits[rows, columns] = (values >> 16).to(torch.int16)
    bits[outliers[~exists, 0]] = NAN
    return bits.view(torch.bfloat16)


def matmul_bf12(
    x: Tensor,
    codes: Tensor,
    outliers: Tensor,
    exponent: int,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """`matmul` by the weight that `pack_bf12` packed."""
    return matmul(x, unpack_bf12(codes, outliers, exponent).to(x.dtype), bias, norm, eps, residual, gated)


def _interleaved(values: Tensor) -> Tensor:
    """[N, K] -> [N, K / 64, 2, 32]: weight 16 a + 8 b + 4 c + d of a group of 32 is at 16 c + 8 a + 2 d + b."""
    features, size = values.shape
    groups = values.view(features, size // BLOCK, 2, 2, 2, 2, 4)  # [..., group, a, b, c, d]
    return groups.permute(0, 1, 2, 5, 3, 6, 4).reshape(features, size // BLOCK, 2, BLOCK // 2)


def _in_order(values: Tensor) -> Tensor:
    """[N, K / 64, 2, 32] -> [N, K]: the inverse of `_interleaved`."""
    features, blocks = values.shape[:2]
    groups = values.reshape(features, blocks, 2, 2, 2, 4, 2)  # [..., group, c, a, d, b]
    return groups.permute(0, 1, 2, 4, 6, 3, 5).reshape(features, blocks * BLOCK)
