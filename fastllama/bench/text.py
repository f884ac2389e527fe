"""Figures as text: percentiles that the samples can tell, and aligned tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

PERCENTILES = (50, 90, 99)


def percentiles(values: Sequence[float]) -> list[float | None]:
    """PERCENTILES of some values; None where too few for one to lie above it: it takes 2, 10 and 100."""
    cuts = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else []
    return [cuts[percent - 1] if len(values) * (100 - percent) >= 100 else None for percent in PERCENTILES]


def milliseconds(seconds: Sequence[float]) -> list[str]:
    """The percentiles of some times, each as a cell."""
    return ["-" if value is None else f"{1000 * value:.2f}" for value in percentiles(seconds)]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows, the header first, in columns: the first to the left, all others, which are figures, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))])
        for first, *rest in rows
    ]
    return "\n".join(map(str.rstrip, lines))
