"""matmul_int8 in Numba: see quantized.py."""

from __future__ import annotations

from torch import Tensor

from fastllama.kernels import cpu
from fastllama.kernels.numba import quantized


def matmul_int8(
    x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, out: Tensor, workspace: Tensor | None
) -> None:
    """See kernels.matmul_int8."""
    if quantized.runs(x, scales):
        quantized.multiply(x, packed, scales, bias, out)
    else:
        cpu.matmul_int8(x, packed, scales, bias, out, workspace)
