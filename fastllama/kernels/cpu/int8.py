"""matmul_int8 and matmul_w8a8 on a CPU: a block of weight rows is widened to fp32 at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllama.kernels.cpu.matmul import BLOCK, by_blocks
from fastllama.kernels.dispatch.checks import as_rows
from fastllama.kernels.reference.int4 import ROWS
from fastllama.kernels.reference.int8 import dequantize_int8, unpack_int8

EXACT = 1024  # columns whose int8 dot product fp32 holds exactly


def matmul_int8(
    x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, out: Tensor, workspace: Tensor | None
) -> None:
    """See kernels.matmul_int8."""
    rows, result = as_rows("x", x), as_rows("out", out)

    def widen(start: int, wide: Tensor) -> None:
        count, size = wide.shape
        codes = unpack_int8(packed[start // ROWS : -(-(start + count) // ROWS)], count, size)
        wide.copy_(dequantize_int8(codes, scales[start : start + count].to(wide.dtype)))

    by_blocks(rows, scales.shape[0], result, widen)
    if bias is not None:
        result += bias


def matmul_w8a8(
    x: Tensor,
    x_scales: Tensor,
    packed: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    out: Tensor,
    workspace: Tensor | None,
) -> None:
    """See kernels.matmul_w8a8. Sums over 1024 columns are under 2^24: exact in fp32, in any order."""
    rows, result, factors = as_rows("x", x).float(), as_rows("out", out), x_scales.reshape(-1, 1)
    for start in range(0, scales.shape[0], BLOCK):
        some = slice(start, start + BLOCK)
        wanted = scales[some].to(factors.dtype)
        codes = unpack_int8(packed[start // ROWS : -(-(start + BLOCK) // ROWS)], wanted.shape[0], rows.shape[1]).float()
        sums = torch.zeros(rows.shape[0], wanted.shape[0], dtype=torch.int32, device=rows.device)
        for left, right in zip(rows.split(EXACT, 1), codes.split(EXACT, 1), strict=True):
            sums += (left @ right.T).int()
        y = sums * factors * wanted
        result[:, some] = y if bias is None else y + bias[some]
