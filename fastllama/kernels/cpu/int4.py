"""matmul_int4 on a CPU: a block of weight rows is dequantized to fp32 at a time."""

from __future__ import annotations

from torch import Tensor

from fastllama.kernels.cpu.matmul import by_blocks
from fastllama.kernels.dispatch.checks import as_rows
from fastllama.kernels.reference.int4 import ROWS, dequantize_int4, unpack_int4


def matmul_int4(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    workspace: Tensor | None,
) -> None:
    """See kernels.matmul_int4."""
    rows, result = as_rows("x", x), as_rows("out", out)

    def widen(start: int, wide: Tensor) -> None:
        count, size = wide.shape
        some = slice(start, start + count)
        codes = unpack_int4(packed[start // ROWS : -(-(start + count) // ROWS)], count, size)
        wide.copy_(dequantize_int4(codes, scales[some].to(wide.dtype), None if zeros is None else zeros[some]))

    by_blocks(rows, scales.shape[0], result, widen)
    if bias is not None:
        result += bias
