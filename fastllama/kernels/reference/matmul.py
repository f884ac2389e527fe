"""Dense matmuls by weights stored [N, K], with their prologue and epilogue."""

from __future__ import annotations

from torch import Tensor

from fastllama.kernels.reference.norm import rms_norm
from fastllama.kernels.reference.numerics import wide
from fastllama.kernels.reference.swiglu import silu_mul


def matmul(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """x [..., K], or rms_norm(x, norm, eps), @ weight [N, K]^T (+ bias [N]), then + residual or silu(gate) * up.

    Accumulated in at least fp32 and rounded once.
    """
    if norm is not None:
        x = rms_norm(x, norm, eps)
    y = wide(x) @ wide(weight).T
    if bias is not None:
        y = y + wide(bias)
    if gated:
        y = silu_mul(y)
    if residual is not None:
        y = y + wide(residual)
    return y.to(x.dtype)
