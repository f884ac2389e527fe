"""The planted faults still fit the kernels: each is an edit of exactly one place."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastllama.testing.mutants import Mutant
from tests.kernels.triton.mutants import MUTANTS

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{Path(mutant.path).stem}: {mutant.name}")
def test_it_can_be_planted(mutant: Mutant) -> None:
    assert mutant.edited(ROOT) != (ROOT / mutant.path).read_text(encoding="utf-8")


def test_each_has_its_own_name() -> None:
    assert len({(mutant.path, mutant.name) for mutant in MUTANTS}) == len(MUTANTS)
