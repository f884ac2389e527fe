"""Statistics of a linear layer's input over a calibration text, for quantizers."""

from __future__ import annotations

import torch
from torch import Tensor

SAMPLED = 1024  # rows
GOLDEN = (5**0.5 - 1) / 2  # its multiples modulo 1 are evenly spread, and have no period


class Activations:
    """Sums over the input rows x [K] of a linear layer, and a sample of the rows.

    absmax: [K] fp32, the largest magnitude of each channel. hessian: [K, K] fp32, the sum of x^T x; empty if not
    requested. num_rows: of the whole text, of which about SAMPLED are kept, spread evenly over the text and over the
    positions in its documents, since the activations of first positions are unlike all others.
    """

    def __init__(self, size: int, num_rows: int, device: torch.device, *, hessian: bool) -> None:
        self.absmax = torch.zeros(size, dtype=torch.float32, device=device)
        side = size if hessian else 0
        self.hessian = torch.zeros(side, side, dtype=torch.float32, device=device)
        self._sum = torch.zeros(size, dtype=torch.float32, device=device)
        self._share, self._seen = SAMPLED / num_rows, 0
        self._kept: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Add rows [R, K] of any floating dtype."""
        wide = x.float()
        magnitudes = wide.abs()
        torch.maximum(self.absmax, magnitudes.amax(0), out=self.absmax)
        self._sum += magnitudes.sum(0)
        if self.hessian.numel():
            self.hessian.addmm_(wide.T, wide)
        numbers = torch.arange(self._seen, self._seen + len(x), dtype=torch.float64, device="cpu")
        self._kept.append(wide[(numbers * GOLDEN % 1 < self._share).to(x.device)])
        self._seen += len(x)

    @property
    def rows(self) -> Tensor:
        """The sampled rows, [R, K] fp32."""
        return torch.cat(self._kept)

    @property
    def absmean(self) -> Tensor:
        """The mean magnitude of each channel, [K] fp32."""
        return self._sum / self._seen

    @property
    def is_finite(self) -> bool:
        """Whether all inputs, and the sums of their squares, are finite; absmax keeps any NaN or infinity."""
        return bool(self.absmax.isfinite().all() and self.hessian.diagonal().isfinite().all())

    def divide(self, factors: Tensor) -> None:
        """Update the statistics for an input whose channels are divided by these factors [K]."""
        self.absmax /= factors
        self._sum /= factors
        if self.hessian.numel():
            self.hessian /= factors
            self.hessian /= factors[:, None]
        self._kept = [rows / factors for rows in self._kept]
