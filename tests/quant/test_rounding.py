"""Rounding to nearest, on scales that are given, and scales that cut off a group's largest values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastllama import kernels
from fastllama.quant import rounding
from fastllama.quant.rounding import CLIPPING, clipped, group_size_of, on_grid, round_to_nearest
from fastllama.quant.weight import QuantizedWeight

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KINDS = [("int4", True), ("int4", False), ("int8", True), ("w8a8", True)]
dtypes = pytest.mark.parametrize("dtype", DTYPES)
kinds = pytest.mark.parametrize(("kind", "symmetric"), KINDS)


def sharp(rows: int, columns: int) -> Tensor:
    """A weight with heavy tails, a row and a group of zeros, and a group with one value that is not 0."""
    weight = torch.distributions.StudentT(3.0).sample((rows, columns)) * 0.02
    weight[1] = 0
    weight[2, :32] = 0
    weight[2, 5] = -0.3
    return weight


@pytest.mark.parametrize(
    ("kind", "columns", "group_size", "expected"),
    [
        ("int4", 256, None, 128),
        ("int4", 192, None, 64),
        ("int4", 96, None, 32),
        ("int4", 100, None, 100),
        ("int4", 32, None, 32),
        ("int4", 256, 32, 32),
        ("int4", 256, 64, 64),
        ("int4", 96, 64, 32),
        ("int4", 100, 64, 100),
        ("int4", 256, -1, 256),
        ("int4", 64, 128, 64),
        ("int4", 20, 20, 20),
        ("int8", 256, None, 256),
        ("int8", 256, 128, 128),
        ("int8", 96, 128, 32),
        ("w8a8", 256, None, 256),
        ("w8a8", 256, 64, 256),
    ],
)
def test_how_many_columns_share_a_scale(kind: str, columns: int, group_size: int | None, expected: int) -> None:
    assert group_size_of(kind, columns, group_size) == expected
    weight = round_to_nearest(torch.randn(3, columns), kind, group_size)
    assert weight.group_size == expected
    assert weight.scales.shape == (3, columns // expected)


@kinds
@dtypes
def test_nearest_values_are_those_of_the_kernels(dtype: torch.dtype, kind: str, symmetric: bool) -> None:
    weight = sharp(40, 192).to(dtype)
    found = round_to_nearest(weight, kind, 64, symmetric=symmetric)
    size = 192 if kind == "w8a8" else 64
    if kind == "int4":
        expected = QuantizedWeight(kind, *kernels.quantize_int4(weight, size, symmetric=symmetric))
    else:
        expected = QuantizedWeight(kind, *kernels.quantize_int8(weight, size))
    assert found.form == expected.form
    assert found.equals(expected)
    assert found.scales.dtype == dtype
    assert (found.zeros is None) == symmetric


@kinds
@dtypes
def test_on_their_own_scales_values_are_the_same(dtype: torch.dtype, kind: str, symmetric: bool) -> None:
    """Bit for bit, whether they come in the dtype of the scales or in fp32; and values of `start` count for nothing."""
    weight = sharp(40, 192).to(dtype)
    for size in (32, 64, -1):
        start = round_to_nearest(weight, kind, size, symmetric=symmetric)
        other = replace(start, values=torch.zeros_like(start.values))
        assert on_grid(weight, other).equals(start)
        assert on_grid(weight.float(), other).equals(start)


@kinds
def test_each_value_on_a_grid_is_the_nearest(kind: str, symmetric: bool) -> None:
    """Beside every other value there is; scales of both signs, and one that is 0."""
    weight = sharp(12, 64)
    start = round_to_nearest(weight, kind, 32, symmetric=symmetric)
    scales = start.scales * torch.where(torch.rand(start.scales.shape) < 0.5, -0.7, 0.8)
    start = replace(start, scales=scales)
    found = on_grid(weight, start)
    low, high = start.limits
    every = [torch.full_like(found.values, value) for value in range(low, high + 1)]
    errors = torch.stack([(replace(found, values=each).dequantize() - weight).abs() for each in every])
    least = errors.amin(0)
    torch.testing.assert_close((found.dequantize() - weight).abs(), least, rtol=0, atol=1e-6)
    assert not found.dequantize()[1].any()
    assert found.zeros is start.zeros
    assert found.scales is start.scales


def squared(found: QuantizedWeight, weight: Tensor) -> Tensor:
    """The squared error of each group, in fp64."""
    error = found.dequantize().double() - weight.double()
    return error.square().unflatten(1, (-1, found.group_size)).sum(2)


@dtypes
@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_clipped_scales_err_no_more(dtype: torch.dtype, group_size: int) -> None:
    weight = sharp(40, 256)
    nearest = round_to_nearest(weight, "int4", group_size)
    start = replace(nearest, scales=nearest.scales.to(dtype))
    found = clipped(weight, start)
    assert found.scales.dtype == dtype
    assert found.values is start.values
    before, after = squared(on_grid(weight, start), weight), squared(on_grid(weight, found), weight)
    assert (after <= before * (1 + 1e-5)).all(), "but for the rounding of the sums"
    assert after.sum() < 0.95 * before.sum()
    assert not found.scales[1].any()


def test_clipped_scales_are_those_of_a_search_through_all() -> None:
    weight = sharp(6, 64)
    start = round_to_nearest(weight, "int4", 32)
    tried = [sign * factor for factor in CLIPPING for sign in (1, -1)]
    starts = [replace(start, scales=start.scales * each) for each in tried]
    errors = torch.stack([squared(on_grid(weight, each), weight) for each in starts])
    best = clipped(weight, start)
    torch.testing.assert_close(squared(on_grid(weight, best), weight), errors.amin(0), rtol=1e-5, atol=0)


def test_a_clipped_scale_may_have_the_other_sign() -> None:
    """8 steps reach one end of a group and 7 the other: here many values at -0.96 count for more than one at 1."""
    weight = torch.full((1, 32), -0.96)
    weight[0, 4] = 1.0
    start = round_to_nearest(weight, "int4", 32)
    assert start.scales.item() == -1 / 8
    found = clipped(weight, start)
    assert found.scales.item() == pytest.approx(0.96 / 8)
    assert on_grid(weight, found).values.tolist() == [[0] * 4 + [15] + [0] * 27]


@pytest.mark.parametrize("chunk", [1, 64, 200])
def test_clipped_scales_do_not_depend_on_how_many_rows_are_searched_at_once(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = sharp(7, 64)
    start = round_to_nearest(weight, "int4", 32)
    expected = clipped(weight, start)
    monkeypatch.setattr(rounding, "CHUNK", chunk)
    assert clipped(weight, start).equals(expected)


def test_nothing_that_is_given_changes() -> None:
    weight = sharp(8, 64)
    start = round_to_nearest(weight, "int4", 32)
    given = [weight, start.values, start.scales]
    before = [each.clone() for each in given]
    on_grid(weight, clipped(weight, start))
    assert all(torch.equal(one, another) for one, another in zip(given, before, strict=True))
