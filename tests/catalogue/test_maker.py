"""Tensors of calls: generated piece by piece, the same for each seed, outputs poisoned."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastllama.catalogue import maker
from fastllama.catalogue.maker import Maker


def test_numbers_are_generated_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """No piece is larger than the limit, and no two pieces repeat the same numbers."""
    monkeypatch.setattr(maker, "DRAWN", 40)
    drawn: list[int] = []
    right = torch.randn

    def randn(shape: torch.Size, **options: Any) -> torch.Tensor:
        drawn.append(shape.numel())
        return right(shape, **options)

    monkeypatch.setattr(torch, "randn", randn)
    m = Maker(torch.float32, generator=torch.Generator().manual_seed(0))
    numbers = m.normal(7, 16)
    assert drawn == [32, 32, 32, 16]
    assert len(numbers.unique()) == 7 * 16
    assert m.normal(0, 16).shape == (0, 16)


def test_outputs_are_poisoned() -> None:
    m = Maker(torch.bfloat16)
    assert m.fresh(2, 3).isnan().all()
    assert m.fresh(2, dtype=torch.int8).tolist() == [127, 127]


def test_some_of_are_distinct_as_long_as_there_are_enough() -> None:
    m = Maker(torch.float32)
    assert sorted(m.some_of(5, 5).tolist()) == list(range(5))
    many = m.some_of(5, 12)
    assert set(many.tolist()) == set(range(5))
    assert len(many) == 12


def test_scratch_memory_is_there_where_it_is_wanted_and_needed() -> None:
    wanted, unwanted = Maker(torch.float32, scratch=True), Maker(torch.float32)
    assert wanted.workspace(torch.zeros, 3).shape == (3,)
    assert wanted.workspace(torch.zeros, 0) is None
    assert unwanted.workspace(torch.zeros, 3) is None
