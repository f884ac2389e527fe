"""Histograms of plain numbers; what is counted, test_async_engine.py sees."""

from __future__ import annotations

import pytest

from fastllama.runtime.statistics import BOUNDS, Histogram


def test_a_histogram_puts_a_value_where_its_bound_says() -> None:
    histogram = Histogram()
    for value in (0.0005, 0.001, 0.0011, 1000.0):
        histogram.observe(value)
    found = histogram.snapshot()
    assert (found.bounds, found.count, found.total) == (BOUNDS, 4, pytest.approx(1000.0026))
    assert (found.counts[:2], found.counts[-1]) == ((2, 1), 1)
