"""docs/reference/kernels.md is what `make kernels-report` writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import triton

from fastllama.testing.targets import TARGETS
from tests.kernels.triton.launch_cases import ALL, CASES
from tests.kernels.triton.launches import Shipped
from tools import kernels_report

ROOT = Path(__file__).parents[2]
PAGE = kernels_report.PAGE.read_text(encoding="utf-8")
VERSION = kernels_report.version(PAGE)


@pytest.mark.compile
@pytest.mark.skipif(triton.__version__ != VERSION, reason=f"the page was made with Triton {VERSION}")
@pytest.mark.parametrize("shipped", CASES)
@pytest.mark.parametrize("target", TARGETS)
def test_each_row_is_up_to_date(shipped: Shipped, target: str) -> None:
    missing = set(kernels_report.rows(shipped, target)) - set(PAGE.splitlines())
    assert not missing, "run `make kernels-report`"


def test_it_lists_each_launch() -> None:
    expected = {(shipped.name, target) for shipped in ALL for target in TARGETS}
    assert kernels_report.listed(PAGE) == expected, "run `make kernels-report`"


def test_it_is_of_the_pinned_version() -> None:
    """Else no run of the pinned set would notice that it is out of date."""
    assert f"triton=={VERSION};" in (ROOT / "requirements-dev.txt").read_text(encoding="utf-8")
