"""Sums over a layer's inputs are the same however the sample is batched."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fastllama.quant import activations
from fastllama.quant.activations import Activations

CPU = torch.device("cpu")
BATCHES = [[100], [1] * 100, [1, 63, 36], [50, 50], [99, 1], [7] * 14 + [2]]
batches = pytest.mark.parametrize("sizes", BATCHES, ids=lambda sizes: f"{len(sizes)} of {sizes[0]}")


def seen(x: Tensor, sizes: Sequence[int], *, hessian: bool = True) -> Activations:
    found = Activations(x.shape[1], len(x), CPU, hessian=hessian)
    for rows in x.split(list(sizes)):
        found.add(rows)
    return found


@batches
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sums_are_those_of_all_rows(sizes: list[int], dtype: torch.dtype) -> None:
    x = (torch.randn(100, 24) * torch.arange(24)).to(dtype)
    found = seen(x, sizes)
    exact = x.double().T @ x.double()
    assert found.hessian.dtype == found.absmax.dtype == torch.float32
    torch.testing.assert_close(found.hessian.double(), exact, rtol=0, atol=100 * 2**-24 * exact.diagonal().max().item())
    assert torch.equal(found.hessian, found.hessian.T)
    assert torch.equal(found.absmax, x.float().abs().amax(0))
    assert found.is_finite


@batches
@pytest.mark.parametrize("limit", [1024, 100, 50, 12, 1])
def test_rows_are_sampled_evenly_in_any_batching(sizes: list[int], limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "SAMPLED", limit)
    x = torch.arange(300).view(100, 3).float()
    rows = seen(x, sizes).rows
    numbers = rows[:, 0] / 3
    assert torch.equal(rows, x[numbers.long()])
    assert abs(len(rows) - min(limit, 100)) <= 1
    gaps = numbers.diff(prepend=torch.tensor([-1.0]), append=torch.tensor([100.0]))
    assert gaps.min() > 0, "each once, in order"
    assert gaps.max() <= 3 * 100 / min(limit, 100)


@pytest.mark.parametrize("length", [128, 256, 2047, 2048])
def test_no_position_of_documents_is_sampled_more_than_its_share(length: int) -> None:
    """A Llama's inputs at the first position are unlike all others; it would be an eighth of the sample."""
    positions = torch.arange(length).repeat(2**17 // length).float()
    rows = seen(positions[:, None], [len(positions)], hessian=False).rows
    counts = rows.long().flatten().bincount(minlength=length)
    assert abs(len(rows) - activations.SAMPLED) <= 2
    assert counts.max() <= 3 + 2 * activations.SAMPLED / length
    assert (counts > 0).sum() >= min(length, activations.SAMPLED) / 2


def test_the_mean_magnitude_is_that_of_all_rows() -> None:
    x = torch.randn(100, 24)
    found = seen(x, [7] * 14 + [2])
    torch.testing.assert_close(found.absmean, x.abs().mean(0), rtol=1e-5, atol=0)
    found.divide(torch.arange(1, 25).float())
    torch.testing.assert_close(found.absmean, x.abs().mean(0) / torch.arange(1, 25), rtol=1e-5, atol=0)


def test_what_was_fed_may_be_overwritten() -> None:
    x = torch.randn(10, 3)
    kept = x.clone()
    found = seen(x, [10])
    x.zero_()
    assert torch.equal(found.rows, kept)


def test_a_hessian_that_is_not_wanted_takes_no_memory() -> None:
    x = torch.randn(10, 3)
    found = seen(x, [4, 6], hessian=False)
    assert found.hessian.shape == (0, 0)
    found.divide(torch.full((3,), 2.0))
    assert torch.equal(found.absmax, x.abs().amax(0) / 2)


@pytest.mark.parametrize("hessian", [True, False])
def test_divided_they_are_those_of_a_divided_input(hessian: bool) -> None:
    x, factors = torch.randn(100, 8), torch.rand(8) * 10 + 0.1
    found, expected = seen(x, [60, 40], hessian=hessian), seen(x / factors, [60, 40], hessian=hessian)
    found.divide(factors)
    torch.testing.assert_close(found.hessian, expected.hessian, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.absmax, expected.absmax)
    torch.testing.assert_close(found.rows, expected.rows)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("row", [0, 50, 99])
def test_what_is_not_finite_is_seen(value: float, row: int) -> None:
    """Finite rows come after it, and it is in none of the kept rows."""
    x = torch.randn(100, 3)
    x[row, 1] = value
    assert not seen(x, [10] * 10, hessian=False).is_finite
