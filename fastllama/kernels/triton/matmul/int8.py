"""matmul_int8 in Triton: see quantized.py."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastllama.kernels.dispatch.fusion import Fusion
from fastllama.kernels.launch.kernel_call import KernelCall, VendorMatmul, launcher
from fastllama.kernels.triton.matmul import quantized


@launcher
def matmul_int8(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    fusion: Fusion,
    out: Tensor,
    workspace: Tensor | None,
) -> Sequence[KernelCall | VendorMatmul]:
    """See kernels.matmul_int8; `fusion` is what `fuses` returned."""
    return quantized.multiply(x, packed, scales, None, bias, fusion, out, workspace)


def fuses(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, fusion: Fusion) -> Fusion:
    """The part of a Fusion that `matmul_int8` computes."""
    return quantized.fuses(x, packed, scales, fusion)
