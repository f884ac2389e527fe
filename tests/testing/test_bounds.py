"""The error bound: what passes, what fails, and by how much."""

from __future__ import annotations

import math

import pytest
import torch

from fastllama.testing.bounds import assert_equal, assert_honest, error

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("found", "exact", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.5], [1.0, 2.0], 0.25),  # by the row's largest, not each element's own
        ([0.0, 0.1], [0.0, 0.0], 0.1),
        ([INF, -INF, 1.0], [INF, -INF, 1.0], 0.0),
        ([INF, 1.0], [-INF, 1.0], INF),
        ([INF, 1.0], [2.0, 1.0], INF),
        ([2.0, 1.0], [INF, 1.0], INF),
        ([NAN, 1.0], [2.0, 1.0], INF),
        ([2.0, 1.0], [NAN, 1.0], INF),
        ([NAN, 1.5], [NAN, 1.0], 0.5),
        ([], [], 0.0),
    ],
)
def test_error_of_a_row(found: list[float], exact: list[float], expected: float) -> None:
    assert error(torch.tensor(found), torch.tensor(exact, dtype=torch.float64)) == pytest.approx(expected)


def test_error_is_the_worst_rows() -> None:
    exact = torch.tensor([[100.0, 1.0], [1.0, 1.0], [3.0, 4.0]], dtype=torch.float64)
    assert error(exact + torch.tensor([[0.0, 1.0], [0.1, 0.0], [0.0, 0.0]]), exact) == pytest.approx(0.1)
    with pytest.raises(AssertionError, match=r"^the result has shape \[3\], the exact one \[2\]$"):
        error(torch.ones(3), torch.ones(2))


def test_twice_the_error_of_plain_torch_and_one_rounding() -> None:
    exact = torch.ones(4, dtype=torch.float64)
    plain = torch.full((4,), 1 + 2**-10)
    limit = 2 * 2**-10 + torch.finfo(torch.float32).eps / 2
    assert_honest(torch.full((4,), 1 + 2 * 2**-10), plain, exact)
    message = rf"^error 0.00196; legal: {limit:.3g} \(twice plain torch's 0.000977, and 5.96e-08\)$"
    with pytest.raises(AssertionError, match=message):
        assert_honest(torch.full((4,), 1 + 2 * 2**-10 + 2**-17), plain, exact)
    with pytest.raises(AssertionError, match=r"^error inf; "):
        assert_honest(torch.full((4,), NAN), plain, exact)


def test_types_are_part_of_the_contract() -> None:
    one, exact = torch.ones(2), torch.ones(2, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"^the result has dtype torch.float16, plain torch's torch.float32$"):
        assert_honest(one.half(), one, exact)
    with pytest.raises(AssertionError, match=r"^the exact result has dtype torch.float32; legal: torch.float64$"):
        assert_honest(one, one, one)


def test_equal_is_bit_for_bit() -> None:
    assert_equal(torch.tensor([1.0, NAN]), torch.tensor([1.0, NAN]))
    with pytest.raises(AssertionError):
        assert_equal(torch.tensor([1.0]), torch.tensor([1.0 + 2**-23]))
    with pytest.raises(AssertionError):
        assert_equal(torch.tensor([1.0]), torch.tensor([1.0]).double())
