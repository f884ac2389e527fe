"""Figures as text: the percentiles that a number of samples supports, and aligned columns."""

from __future__ import annotations

import pytest

from fastllama.bench import text


def test_percentiles() -> None:
    assert text.percentiles([float(i) for i in range(101)]) == pytest.approx([50, 90, 99])


@pytest.mark.parametrize(("count", "reported"), [(1, 0), (2, 1), (9, 1), (10, 2), (99, 2), (100, 3)])
def test_a_percentile_that_no_sample_lies_above_is_not_reported(count: int, reported: int) -> None:
    found = text.percentiles([0.25] * count)
    assert found == [0.25] * reported + [None] * (3 - reported)
    assert text.milliseconds([0.25] * count) == ["250.00"] * reported + ["-"] * (3 - reported)


def test_a_table_has_its_names_on_the_left_and_figures_on_the_right() -> None:
    assert text.table([("what", "us"), ("a", "1.50"), ("longer", "10.25")]) == (
        "what       us\na        1.50\nlonger  10.25"
    )
