"""GPTQ against its textbook formulas in fp64, on Hessians of every kind, and by the error of the output."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama.quant.gptq import DAMPING, feedback_of, gptq
from fastllama.quant.rounding import clipped, on_grid, round_to_nearest
from fastllama.quant.weight import QuantizedWeight
from tests.quant.layers import correlated, output_error
from tests.quant.memory import MemoryWatch

TIE = 2e-4  # in steps of a scale: values in fp64 that come so near to the middle of two are left out of comparisons


def textbook(weight: Tensor, hessian: Tensor, start: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """The values that Optimal Brain Quantization chooses in this order of columns, and which rows stay off all ties.

    Frantar et al., GPTQ, equations 2 and 3: the error of a column, over the inverse's diagonal, times the inverse's row
    goes to the columns left; then that column is eliminated from the inverse.
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    damped = hessian.double()[order][:, order]
    mean = damped.diagonal().mean()
    damped += torch.eye(len(order), dtype=torch.float64) * (DAMPING * mean if mean else 1)
    inverse = torch.linalg.inv(damped)
    left, values = weight.double()[:, order], torch.empty(weight.shape, dtype=start.values.dtype)
    clear = torch.ones(weight.shape[0], dtype=torch.bool)
    for column in order.tolist():
        scales, zeros = (each[:, column // start.group_size].double() for each in start.grid)
        sought = torch.where(scales == 0, 0, left[:, 0] / scales)
        clear &= (sought - sought.floor() - 0.5).abs() > TIE
        value = (sought.round() + zeros).clamp(*start.limits)
        error = (left[:, 0] - (value - zeros) * scales) / inverse[0, 0]
        left = (left - error[:, None] * inverse[0])[:, 1:]
        inverse = (inverse - inverse[:, :1] * inverse[:1] / inverse[0, 0])[1:, 1:]
        values[:, column] = value.to(values.dtype)
    return values, clear


def assert_textbook(weight: Tensor, hessian: Tensor, start: QuantizedWeight) -> None:
    found = gptq(weight, hessian, start)
    expected, clear = textbook(weight, hessian, start)
    assert clear.float().mean() > 0.5, "most rows are compared"
    assert torch.equal(found.values[clear], expected[clear])
    assert found.scales is start.scales
    assert found.zeros is start.zeros


def fed(columns: int, tokens: int, rows: int = 24) -> tuple[Tensor, Tensor]:
    """A weight and a Hessian."""
    weight, inputs = correlated(rows, columns, tokens, seed=columns)
    return weight, inputs.T @ inputs


@pytest.mark.parametrize(
    ("columns", "kind", "group_size", "symmetric"),
    [
        (128, "int4", 128, True),
        (128, "int4", 32, False),
        (320, "int4", 64, True),
        (320, "int4", 32, False),
        (200, "int4", -1, True),  # the last block of columns is not full
        (200, "int8", -1, True),
        (128, "int8", 64, True),
        (160, "w8a8", -1, True),
        (1, "int4", -1, True),
    ],
)
def test_values_are_those_of_the_textbook(columns: int, kind: str, group_size: int, symmetric: bool) -> None:
    weight, hessian = fed(columns, 600)
    start = round_to_nearest(weight, kind, group_size, symmetric=symmetric)
    assert_textbook(weight, hessian, start)
    if columns > 1:
        assert not torch.equal(gptq(weight, hessian, start).values, start.values)


def test_two_columns_by_hand() -> None:
    """H = [[8, 4], [4, 4]] and its damping 0.06: half a step of the first column asks for 4 / 4.06 of it in the second.

    The first column stands on 0.45 steps and becomes 0; the second, at 0.1, is then sought at 0.1 + 0.45 * 0.985, which
    is 0.54 and becomes 1. Rounded by itself it is 0.
    """
    weight, hessian = torch.tensor([[0.45, 0.1]]), torch.tensor([[8.0, 4.0], [4.0, 4.0]])
    start = QuantizedWeight("int8", torch.zeros(1, 2, dtype=torch.int8), torch.ones(1, 1))
    assert gptq(weight, hessian, start).values.tolist() == [[0, 1]]
    assert on_grid(weight, start).values.tolist() == [[0, 0]]
    feedback = feedback_of(hessian, torch.tensor([0, 1]), DAMPING)
    assert feedback[0, 1].item() == pytest.approx(4 / 4.06)


def test_the_column_with_the_largest_diagonal_is_rounded_first() -> None:
    """As above with columns in the other order: the second is rounded first, and the first makes up for it."""
    weight, hessian = torch.tensor([[0.1, 0.45]]), torch.tensor([[4.0, 4.0], [4.0, 8.0]])
    start = QuantizedWeight("int8", torch.zeros(1, 2, dtype=torch.int8), torch.ones(1, 1))
    assert gptq(weight, hessian, start).values.tolist() == [[1, 0]]


@pytest.mark.parametrize("diagonal", [[3.0, 1.0, 2.0, 5.0] * 40, [0.0] * 160, [0.0, 1e-30] * 80, [0.0, 1e30] * 80])
def test_columns_that_are_not_correlated_are_rounded_to_nearest(diagonal: list[float]) -> None:
    weight = torch.randn(8, 160)
    start = round_to_nearest(weight, "int4", 32)
    assert torch.equal(gptq(weight, torch.diag(torch.tensor(diagonal)), start).values, start.values)


def test_fewer_rows_than_columns() -> None:
    weight, hessian = fed(192, tokens=40)
    assert torch.linalg.matrix_rank(hessian) < 192
    assert_textbook(weight, hessian, round_to_nearest(weight, "int4", 64))


def test_one_row() -> None:
    weight, hessian = fed(96, tokens=1)
    assert_textbook(weight, hessian, round_to_nearest(weight, "int4", 32))


def test_a_column_that_is_there_twice() -> None:
    weight, inputs = correlated(24, 96, 400, seed=1)
    inputs[:, 40] = inputs[:, 7]
    assert_textbook(weight, inputs.T @ inputs, round_to_nearest(weight, "int4", 32))


def test_columns_that_are_never_fed_are_rounded_to_nearest() -> None:
    weight, inputs = correlated(24, 96, 400, seed=1)
    dead = [0, 5, 95]
    inputs[:, dead] = 0
    hessian, start = inputs.T @ inputs, round_to_nearest(weight, "int4", 32)
    assert torch.equal(gptq(weight, hessian, start).values[:, dead], start.values[:, dead])
    assert_textbook(weight, hessian, start)


@pytest.mark.parametrize(("kind", "symmetric"), [("int4", True), ("int4", False), ("int8", True)])
def test_groups_of_zeros(kind: str, symmetric: bool) -> None:
    """Groups with scale 0 keep the value 0, whatever error other columns would pass on to them."""
    weight, hessian = fed(128, 600)
    weight *= 1000
    weight[3, 32:64] = 0
    weight[5] = 0
    start = round_to_nearest(weight, kind, 32, symmetric=symmetric)
    found = gptq(weight, hessian, start)
    assert torch.equal(found.values[3, 32:64], start.values[3, 32:64])
    assert torch.equal(found.values[5], start.values[5])
    assert not found.dequantize()[5].any()
    assert_textbook(weight, hessian, start)


def test_the_unit_of_the_hessian_does_not_matter() -> None:
    weight, hessian = fed(128, 600)
    start = round_to_nearest(weight, "int4", 64)
    found = [gptq(weight, hessian * 2.0**exponent, start).values for exponent in (-20, 0, 20)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[2], found[1])


def eliminated(hessian: Tensor) -> Tensor:
    """A of H = (A + I) D (A + I)^T in exact fractions, H of integers."""
    left = [[Fraction(int(each)) for each in row] for row in hessian.tolist()]
    found = torch.zeros(hessian.shape, dtype=torch.float64)
    for j in reversed(range(len(left))):
        for i in range(j):
            factor = left[i][j] / left[j][j]
            found[i, j] = float(factor)
            left[i] = [one - factor * another for one, another in zip(left[i][:j], left[j], strict=False)]
    return found


def test_what_is_not_positive_definite_in_fp32_is_factored_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pascal's matrix [14, 14]: integers below 2^24, so that fp32 holds them, and the determinant is 1.

    In 187 of 200 random orders fp32 finds a pivot below 0. Here are four on one diagonal.
    """
    pascal = torch.tensor([[math.comb(i + j, i) for j in range(14)] for i in range(14)])
    orders = [torch.randperm(14) for _ in range(4)]
    exact = torch.block_diag(*(pascal[order][:, order] for order in orders))
    tried, factor = [], torch.linalg.cholesky_ex

    def spying(matrix: Tensor) -> Any:
        found = factor(matrix)
        tried.append((matrix.dtype, bool(found.info)))
        return found

    monkeypatch.setattr(torch.linalg, "cholesky_ex", spying)
    found = feedback_of(exact.float(), torch.arange(len(exact)), 0.0).triu(1)
    assert tried == [(torch.float32, True), (torch.float64, False)]
    torch.testing.assert_close(found, eliminated(exact).float(), rtol=1e-4, atol=1e-4)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "hessian",
    [
        [[1.0, 2.0], [2.0, 1.0]],
        [[-1.0, 0.0], [0.0, -1.0]],
        [[NAN, 0.0], [0.0, 1.0]],
        [[1.0, NAN], [NAN, 1.0]],
        [[1.0, 0.0], [0.0, INF]],
        [[1.0, INF], [INF, 1.0]],
    ],
)
def test_what_is_no_sum_of_squares_is_refused(hessian: list[list[float]]) -> None:
    weight = torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"hessian is not positive definite; legal: a sum of x\^T x over finite rows"):
        gptq(weight, torch.tensor(hessian), round_to_nearest(weight, "int4", -1))


@pytest.mark.parametrize(("kind", "group_size"), [("int4", 128), ("int4", 32), ("int4", -1), ("int8", -1)])
@pytest.mark.parametrize("seed", range(4))
def test_the_output_errs_half_as_much_as_rounded_to_nearest(kind: str, group_size: int, seed: int) -> None:
    """On unseen rows, 0.2 to 0.35 of the error is left. Clipped scales lower it further."""
    weight, inputs = correlated(48, 256, 1536, seed)
    seen, unseen = inputs[:1024], inputs[1024:]
    nearest = round_to_nearest(weight, kind, group_size)
    error = output_error(nearest.dequantize(), weight, unseen)
    found = output_error(gptq(weight, seen.T @ seen, nearest).dequantize(), weight, unseen)
    assert 0 < found <= 0.5 * error
    if kind == "int4":
        cut = gptq(weight, seen.T @ seen, clipped(weight, nearest))
        assert 0 < output_error(cut.dequantize(), weight, unseen) < found


def test_values_are_chosen_under_scales_as_they_are_kept() -> None:
    """bf16's 8 bits move 127 steps by half a step."""
    weight, hessian = fed(128, 600)
    for kind in ("int4", "int8"):
        nearest = round_to_nearest(weight, kind, -1)
        start = replace(nearest, scales=nearest.scales.bfloat16())
        found = gptq(weight, hessian, start)
        assert found.scales.dtype == torch.bfloat16
        same = gptq(weight, hessian, replace(nearest, scales=start.scales.float()))
        assert torch.equal(found.values, same.values)
        assert not torch.equal(found.values, gptq(weight, hessian, nearest).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_that_is_given_changes_and_the_same_gives_the_same(dtype: torch.dtype) -> None:
    weight, hessian = fed(128, 600)
    weight = weight.to(dtype)
    start = clipped(weight, round_to_nearest(weight, "int4", 32))
    given = [weight, hessian, start.values, start.scales]
    before = [each.clone() for each in given]
    found = gptq(weight, hessian, start)
    assert all(torch.equal(one, another) for one, another in zip(given, before, strict=True))
    assert gptq(weight, hessian, start).equals(found)
    empty = replace(start, values=torch.zeros_like(start.values))
    assert gptq(weight, hessian, empty).equals(found), "values of start count for nothing"


def test_memory_is_two_hessians_beside_the_one_that_is_given() -> None:
    """A Hessian of 11008 columns has 485 MB."""
    weight, hessian = fed(640, 700, rows=2)
    start = round_to_nearest(weight, "int4", 32)
    with MemoryWatch() as watch:
        gptq(weight, hessian, start)
    assert 1.9 < watch.most / hessian.nbytes < 2.1
