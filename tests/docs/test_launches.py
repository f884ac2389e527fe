"""docs/kernels/launches.md names each family of launches, its shape and its launch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

from fastllama.kernels.launch.tuning import FAMILIES

PAGE = Path(__file__).parents[2] / "docs" / "kernels" / "launches.md"


def test_its_table_is_that_of_the_heuristics() -> None:
    rows = [line.split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    found = {family.strip("|` "): (shape, launch.strip("| ")) for family, _, shape, launch in rows}
    expected = {
        name: (_listed(family.shape), _listed(each.name for each in fields(family.launch)))
        for name, family in FAMILIES.items()
    }
    assert found == expected


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
