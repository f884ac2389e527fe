"""matmul_int4 in Triton: see quantized.py."""

from __future__ import annotations

from torch import Tensor

from fastllama.kernels.dispatch.fusion import Fusion
from fastllama.kernels.launch.kernel_call import launcher
from fastllama.kernels.triton.matmul import quantized

matmul_int4 = launcher(quantized.multiply)


def fuses(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, fusion: Fusion
) -> Fusion:
    """The part of a Fusion that `matmul_int4` computes."""
    return quantized.fuses(x, packed, scales, fusion)
