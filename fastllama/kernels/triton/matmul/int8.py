"""matmul_int8 in Triton: see codes.py."""

from __future__ import annotations

from torch import Tensor

from fastllama.kernels.dispatch.op import Function
from fastllama.kernels.launch.kernel_call import KernelCall, launcher
from fastllama.kernels.triton.matmul.quantized import few_rows, multiply, product, workspace_size

__all__ = ["few_rows", "matmul_int8", "workspace_size"]


@launcher
def _multiply(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
    gated: bool,
    out: Tensor,
    workspace: Tensor | None,
) -> list[KernelCall]:
    return multiply(x, packed, scales, None, bias, norm, eps, residual, gated, out, workspace)


def matmul_int8(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
    gated: bool,
    out: Tensor,
    workspace: Tensor | None,
) -> Function | None:
    """See kernels.matmul_int8."""
    return product(_multiply, x, (packed, scales, bias), None, norm, eps, residual, gated, out, workspace)
