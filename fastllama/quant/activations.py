"""What a linear layer is fed over a text, as far as quantizers want to know it."""

from __future__ import annotations

import torch
from torch import Tensor

SAMPLED = 1024  # rows that are kept
GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo 1, are spread evenly, and repeat at no length of documents


class Activations:
    """Sums over the rows x [K] that a linear layer is fed, and some of the rows.

    absmax: [K] fp32, the largest magnitude of each channel. hessian: [K, K] fp32, the sum of x^T x; empty unless it is
    wanted. num_rows: how many will come, of which about SAMPLED are kept: spread evenly over the text and over the
    positions in its documents, since the first position of each feeds layers what no other does.
    """

    def __init__(self, size: int, num_rows: int, device: torch.device, *, hessian: bool) -> None:
        self.absmax = torch.zeros(size, dtype=torch.float32, device=device)
        side = size if hessian else 0
        self.hessian = torch.zeros(side, side, dtype=torch.float32, device=device)
        self._sum = torch.zeros(size, dtype=torch.float32, device=device)
        self._share, self._seen = SAMPLED / num_rows, 0
        self._kept: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Rows [R, K] of any floating dtype."""
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
        """[R, K] fp32."""
        return torch.cat(self._kept)

    @property
    def absmean(self) -> Tensor:
        """The mean magnitude of each channel, [K] fp32."""
        return self._sum / self._seen

    @property
    def is_finite(self) -> bool:
        """Whether all that came was, and its squares in sum; a NaN or an infinity stays in absmax."""
        return bool(self.absmax.isfinite().all() and self.hessian.diagonal().isfinite().all())

    def divide(self, factors: Tensor) -> None:
        """Make them those of an input whose channels are divided by these factors [K]."""
        self.absmax /= factors
        self._sum /= factors
        if self.hessian.numel():
            self.hessian /= factors
            self.hessian /= factors[:, None]
        self._kept = [rows / factors for rows in self._kept]
