"""The dtype in which the reference computes."""

from __future__ import annotations

import torch


def wide_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype for computing with x, and of its log-sum-exps: fp64 for fp64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype in which the reference computes: fp64 (the oracle) for fp64, else fp32."""
    return x if x.dtype == torch.float64 else x.float()
