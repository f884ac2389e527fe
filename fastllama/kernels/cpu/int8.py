"""Products with 8-bit weights on a CPU: a block of rows is dequantized to fp32 at a time."""

from __future__ import annotations

from torch import Tensor

from fastllama.kernels.checks import as_rows
from fastllama.kernels.cpu.matmul import by_blocks
from fastllama.kernels.reference.int4 import ROWS
from fastllama.kernels.reference.int8 import dequantize_int8, unpack_int8


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
