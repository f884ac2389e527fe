"""RMSNorm, alone and after a residual addition."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllama.kernels.reference.numerics import wide


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """weight * cast(x / sqrt(mean(x^2) + eps)), cast to x's dtype before the weight, as Hugging Face does."""
    h = wide(x)
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return (weight * h.to(x.dtype)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), the sum rounded to x's dtype before it is normalised."""
    total = x + residual
    return rms_norm(total, weight, eps), total
