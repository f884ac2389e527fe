"""matmul on a CPU, where torch's linear layer is slow for one row and, without bf16 hardware, for many.

Measured on two AVX2 cores at N, K = 11264, 2048 (docs/measured/cpu.md): one bf16 row takes 4.1 ms through F.linear and
2.3 ms through mv (memory speed); 128 rows take 273 ms in bf16 and a quarter of that when blocks of the weight are
widened to fp32 first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastllama.kernels.dispatch.checks import as_rows
from fastllama.kernels.launch.device import runs_natively
from fastllama.kernels.reference import numerics

ROW_LIMIT = 8  # rows up to which a pass over the 16-bit weight for each row beats one pass that widens it
BLOCK = 1024  # weight rows widened at a time: 8 MB at K = 2048, inside the shared cache


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, workspace: Tensor | None) -> None:
    """See kernels.matmul."""
    rows, result = as_rows("x", x), as_rows("out", out)
    if rows.shape[0] == 1:
        torch.mv(weight, rows[0], out=result[0])
    elif x.dtype in (torch.float32, torch.float64) or runs_natively(x.dtype):
        torch.mm(rows, weight.T, out=result)
    elif rows.shape[0] <= ROW_LIMIT:
        for row, target in zip(rows, result, strict=True):
            torch.mv(weight, row, out=target)
    else:
        # Widened to fp32: 16-bit matmuls without hardware for them run at scalar speed.
        by_blocks(rows, weight.shape[0], result, lambda start, wide: wide.copy_(weight[start : start + BLOCK]))
    if bias is not None:
        result += bias


def by_blocks(rows: Tensor, features: int, result: Tensor, widen: Callable[[int, Tensor], object]) -> None:
    """Matmul in fp32, or fp64 for rows in fp64, by weight rows that `widen(first, buffer)` writes block by block."""
    rows = numerics.wide(rows)
    buffer = rows.new_empty(min(BLOCK, features), rows.shape[1])
    for start in range(0, features, BLOCK):
        wide = buffer[: features - start]
        widen(start, wide)
        result[:, start : start + BLOCK] = rows @ wide.T
