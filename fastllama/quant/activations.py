"""What a linear layer is fed over a text, as far as quantizers want to know it."""

from __future__ import annotations

import torch
from torch import Tensor

SAMPLED = 1024  # rows that are kept


class Activations:
    """Sums over the rows x [K] that a linear layer is fed, and some of the rows.

    absmax: [K] fp32, the largest magnitude of each channel. hessian: [K, K] fp32, the sum of x^T x; empty unless it is
    wanted. num_rows: how many will come, of which about SAMPLED, evenly spaced, are kept.
    """

    def __init__(self, size: int, num_rows: int, device: torch.device, *, hessian: bool) -> None:
        self.absmax = torch.zeros(size, dtype=torch.float32, device=device)
        side = size if hessian else 0
        self.hessian = torch.zeros(side, side, dtype=torch.float32, device=device)
        self._every, self._seen = max(num_rows // SAMPLED, 1), 0
        self._kept: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Rows [R, K] of any floating dtype."""
        wide = x.float()
        torch.maximum(self.absmax, wide.abs().amax(0), out=self.absmax)
        if self.hessian.numel():
            self.hessian.addmm_(wide.T, wide)
        self._kept.append(wide[-self._seen % self._every :: self._every].clone())
        self._seen += len(x)

    @property
    def rows(self) -> Tensor:
        """[R, K] fp32."""
        return torch.cat(self._kept)

    @property
    def is_finite(self) -> bool:
        """Whether all that came was; a NaN or an infinity stays in absmax."""
        return bool(self.absmax.isfinite().all())

    def divide(self, factors: Tensor) -> None:
        """Make them those of an input whose channels are divided by these factors [K]."""
        self.absmax /= factors
        if self.hessian.numel():
            self.hessian /= factors
            self.hessian /= factors[:, None]
        self._kept = [rows / factors for rows in self._kept]
