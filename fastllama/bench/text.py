"""Formats figures: percentiles that the samples support, and aligned tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

PERCENTILES = (50, 90, 99)


def percentiles(values: Sequence[float]) -> list[float | None]:
    """PERCENTILES of values; None without a value above: p50, p90 and p99 need 2, 10 and 100 values."""
    cuts = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else []
    return [cuts[percent - 1] if len(values) * (100 - percent) >= 100 else None for percent in PERCENTILES]


def milliseconds(seconds: Sequence[float]) -> list[str]:
    """The percentiles of times, as table cells."""
    return ["-" if value is None else f"{1000 * value:.2f}" for value in percentiles(seconds)]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned rows, the header first: the first column to the left, the others, which are numbers, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))])
        for first, *rest in rows
    ]
    return "\n".join(map(str.rstrip, lines))
