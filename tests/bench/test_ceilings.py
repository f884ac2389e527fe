"""The ceilings of a device: bytes and operations counted by hand, and the samples in the record."""

from __future__ import annotations

import statistics

import pytest
import torch

from fastllama.bench import ceilings


def test_a_ceiling_is_the_work_over_the_median_of_its_samples() -> None:
    found = ceilings.ceilings(torch.device("cpu"), toy=True)
    copies, sums, mvs, products = (found["seconds"][name] for name in ("copy", "sum", "mv", "product"))
    assert len(copies) == len(sums) == len(mvs) == len(products) == ceilings.ROUNDS
    fastest = min(map(statistics.median, (sums, mvs)))
    assert found["read_bytes_per_second"] == pytest.approx(2 * ceilings.TOY_COPY / fastest)
    moved = 2 * 2 * ceilings.TOY_COPY  # 2 bytes a number, read and written
    assert found["copy_bytes_per_second"] == pytest.approx(moved / statistics.median(copies))
    operations = 2 * ceilings.TOY_SIZE**3
    assert found["bf16_flops_per_second"] == pytest.approx(operations / statistics.median(products))


def test_a_share_names_its_ceiling() -> None:
    reached = {"copy_bytes_per_second": 2e12, "read_bytes_per_second": 4e12}
    assert ceilings.shares(1e12, reached) == {"of_read": 0.25, "of_copy": 0.5}
