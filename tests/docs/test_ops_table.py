"""The tables of docs/kernels/index.md are what `make docs` writes."""

from __future__ import annotations

from fastllama import kernels
from tools.ops_table import MARK, PAGE, tables


def test_it_is_up_to_date() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page.split(MARK)[1].strip() == tables().strip(), "run `make docs`"


def test_it_has_each_public_name_once() -> None:
    rows = [line.split("|")[1].strip() for line in tables().splitlines() if line.startswith("| `")]
    assert sorted(rows) == sorted(f"`{name}`" for name in kernels.__all__)
