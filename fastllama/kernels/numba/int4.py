"""Products with 4-bit weights."""

from __future__ import annotations

from torch import Tensor

from fastllama.kernels import cpu
from fastllama.kernels.numba import codes


def matmul_int4(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    workspace: Tensor | None,
) -> None:
    """See kernels.matmul_int4. Zeros are the other CPU implementation's."""
    if zeros is None and codes.runs(x, scales):
        codes.multiply(x, packed, scales, bias, out)
    else:
        cpu.matmul_int4(x, packed, scales, zeros, bias, out, workspace)
