"""A mean over the tokens of a text, and its standard error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastllama.arithmetic import exp


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens. standard_error: None where there is only one cluster, which gives no variance."""

    value: float
    standard_error: float | None

    @classmethod
    def ratio(cls, totals: Sequence[float], counts: Sequence[int]) -> Estimate:
        """The mean per token, given the sum totals[i] over the counts[i] tokens of each cluster i.

        Tokens of one document depend on each other, so clusters are the independent units: the standard error is that
        of a ratio estimator over clusters of different sizes, sqrt(m / (m - 1) sum((total - mean count)^2)) /
        sum(counts) for m clusters. For per-token differences of two models it is the paired standard error.
        Sources: Cochran, Sampling Techniques, 1977, chapter 6; Miller, Adding Error Bars to Evals, arXiv:2411.00640.
        """
        count, clusters = sum(counts), len(counts)
        value = math.fsum(totals) / count
        if clusters < 2:
            return cls(value, None)
        residuals = (total - value * own for total, own in zip(totals, counts, strict=True))
        squares = math.fsum(residual * residual for residual in residuals)
        return cls(value, math.sqrt(clusters / (clusters - 1) * squares) / count)

    def exp(self) -> Estimate:
        """The exponential of the mean, and its standard error to first order (the delta method)."""
        value = exp(self.value)
        return Estimate(value, None if self.standard_error is None else value * self.standard_error)

    def as_json(self) -> dict[str, float | None]:
        """value and standard_error, None for a number that JSON cannot represent."""
        return {name: _finite(number) for name, number in vars(self).items()}


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None
