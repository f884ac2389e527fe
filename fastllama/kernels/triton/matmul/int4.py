"""matmul_int4 in Triton: see codes.py."""

from __future__ import annotations

from torch import Tensor

from fastllama.kernels.dispatch.op import Function
from fastllama.kernels.launch.kernel_call import launcher
from fastllama.kernels.triton.matmul.quantized import few_rows, multiply, product, workspace_size

__all__ = ["few_rows", "matmul_int4", "workspace_size"]

_multiply = launcher(multiply)


def matmul_int4(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
    gated: bool,
    out: Tensor,
    workspace: Tensor | None,
) -> Function | None:
    """See kernels.matmul_int4."""
    weight = packed, scales, zeros, bias
    return product(_multiply, x, weight, zeros, norm, eps, residual, gated, out, workspace)
