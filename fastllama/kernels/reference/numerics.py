"""The dtype in which the reference computes."""

from __future__ import annotations

import torch


def wide_dtype(x: torch.Tensor) -> torch.dtype:
    """What x is computed in, and what its log-sum-exps are in: fp64 stays, everything else becomes fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype the reference computes in: fp64 stays (the oracle), everything else becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()
