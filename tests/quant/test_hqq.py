"""HQQ: scales and zeros that round a weight better than its extremes do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastllama.quant.hqq import hqq
from fastllama.quant.rounding import on_grid, round_to_nearest
from fastllama.quant.weight import QuantizedWeight

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def weight_of(rows: int = 24, columns: int = 192) -> Tensor:
    return torch.distributions.StudentT(5.0).sample((rows, columns)) * 0.02


def squared(found: QuantizedWeight, weight: Tensor) -> Tensor:
    """The squared error of each group, in fp64."""
    return (found.dequantize().double() - weight).square().unflatten(1, (-1, found.group_size)).sum(2)


@dtypes
@pytest.mark.parametrize("group_size", [32, 64, 128, -1, None])
def test_no_group_errs_more_than_rounded_to_nearest(group_size: int | None, dtype: torch.dtype) -> None:
    """The sum over all groups falls by some 5 %."""
    weight = weight_of()
    found = hqq(weight, group_size, dtype)
    nearest = round_to_nearest(weight, "int4", group_size, symmetric=False)
    kept = on_grid(weight, QuantizedWeight("int4", nearest.values, nearest.scales.to(dtype), nearest.zeros))
    before, after = squared(kept, weight), squared(found, weight)
    assert (after <= before * (1 + 1e-5)).all()
    assert 0 < after.sum() < 0.97 * before.sum()
    assert found.form == kept.form
    assert found.form.zeros == torch.uint8
    assert found.zeros is not None
    assert found.zeros.max() <= 15


@dtypes
def test_values_are_the_nearest_under_scales_as_they_are_kept(dtype: torch.dtype) -> None:
    weight = weight_of()
    found = hqq(weight, 64, dtype)
    assert found.scales.dtype == dtype
    assert on_grid(weight, found).equals(found)


def test_a_weight_and_its_multiple_are_rounded_alike() -> None:
    """Weights are scaled by powers of two from 2^-40 to 2^40: no constant depends on their unit."""
    weight = weight_of()
    expected = hqq(weight, 64, torch.float32)
    for exponent in (-40, -7, 40):
        found = hqq(weight * 2.0**exponent, 64, torch.float32)
        assert torch.equal(found.values, expected.values)
        assert torch.equal(found.scales, expected.scales * 2.0**exponent)


def test_groups_of_zeros_of_one_value_and_of_one_sign() -> None:
    weight = weight_of()
    weight[0] = 0
    weight[1, :64] = 0.125
    weight[2, :64] = -3.0
    weight[3, :64] = weight[3, :64].abs() + 1
    weight[4, 5] = 50.0
    found = hqq(weight, 64, torch.bfloat16)
    made = found.dequantize()
    assert made.isfinite().all()
    assert found.scales.isfinite().all()
    assert not made[0].any()
    torch.testing.assert_close(made[1:3, :64], weight[1:3, :64], rtol=2**-8, atol=0)
    nearest = round_to_nearest(weight, "int4", 64, symmetric=False).dequantize()
    assert (made[3] - weight[3]).norm() <= 1.02 * (nearest[3] - weight[3]).norm()
    assert (made[4] - weight[4]).norm() <= 1.02 * (nearest[4] - weight[4]).norm()


def test_what_float16_does_not_hold_is_0() -> None:
    weight = torch.randn(4, 64) * 1e-9
    found = hqq(weight, 64, torch.float16)
    assert found.dequantize().abs().max() <= 6e-8 * 15
    assert (found.dequantize() - weight).norm() <= weight.norm()


def test_nothing_that_is_given_changes_and_the_same_gives_the_same() -> None:
    weight = weight_of()
    before = weight.clone()
    found = hqq(weight, 64, torch.float32)
    assert torch.equal(weight, before)
    assert hqq(weight, 64, torch.float32).equals(found)
