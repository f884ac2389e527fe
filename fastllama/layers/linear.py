"""Linear layers and norms over the ops; parameters never need gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastllama import kernels


def parameter(*shape: int, dtype: torch.dtype, device: torch.device | str) -> nn.Parameter:
    """An uninitialised inference parameter."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


class Linear(nn.Module):
    """y = x W^T (+ b), weight [out_features, in_features]."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.weight = parameter(out_features, in_features, dtype=dtype, device=device)
        self.bias = parameter(out_features, dtype=dtype, device=device) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        return kernels.matmul(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """Root-mean-square norm, with the residual addition in front of it."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.weight = parameter(size, dtype=dtype, device=device)
        self.eps = eps

    def forward(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(norm(hidden + residual), hidden + residual), both in place; without a residual hidden becomes it."""
        if residual is None:
            return kernels.rms_norm(hidden, self.weight, self.eps), hidden
        return kernels.add_rms_norm(hidden, residual, self.weight, self.eps, out=hidden, residual_out=residual)
