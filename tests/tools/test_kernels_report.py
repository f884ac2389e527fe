"""docs/reference/kernels/ is what `make kernels-report` writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import triton

from fastllama.testing.targets import TARGETS
from tests.kernels.triton.launch_cases import CASES
from tests.kernels.triton.launches import SHIPPED, Shipped
from tools import kernels_report

ROOT = Path(__file__).parents[2]
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in kernels_report.FOLDER.glob("*.md")}
INDEX = PAGES.pop("index")
VERSION = kernels_report.version(INDEX)
made_with = pytest.mark.skipif(triton.__version__ != VERSION, reason=f"the pages were made with Triton {VERSION}")


@pytest.mark.compile
@made_with
@pytest.mark.parametrize("shipped", CASES)
@pytest.mark.parametrize("target", TARGETS)
def test_each_row_is_up_to_date(shipped: Shipped, target: str) -> None:
    (family,) = [family for family, launches in SHIPPED.items() if shipped in launches]
    missing = set(kernels_report.rows(family, shipped, target)) - set(PAGES[family].splitlines())
    assert not missing, "run `make kernels-report`"


@pytest.mark.parametrize("family", SHIPPED)
def test_a_page_lists_each_launch_of_its_family(family: str) -> None:
    expected = {(shipped.name, target) for shipped in SHIPPED[family] for target in TARGETS}
    assert kernels_report.listed(PAGES[family]) == expected, "run `make kernels-report`"


def test_each_page_is_of_a_family() -> None:
    assert PAGES.keys() == SHIPPED.keys()


@made_with
def test_the_index_is_up_to_date() -> None:
    assert kernels_report.index() == INDEX, "run `make kernels-report`"


def test_it_is_of_the_pinned_version() -> None:
    """Otherwise no run of the pinned set would find it out of date."""
    assert f"triton=={VERSION};" in (ROOT / "requirements-dev.txt").read_text(encoding="utf-8")
