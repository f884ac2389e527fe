"""Scales of AWQ and SmoothQuant: against their formulas, and by the error of the output."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastllama.quant.rounding import round_to_nearest
from fastllama.quant.scaling import FLOOR, awq_scales, smoothquant_scales
from tests.quant.layers import correlated, output_error

GRID = [step / 20 for step in range(21)]  # exponents; AWQ's are below 1


def int4(weight: Tensor) -> Tensor:
    return round_to_nearest(weight, "int4", 32).dequantize()


def int8(rows: Tensor) -> Tensor:
    """Rows rounded to 127 steps of each one's largest magnitude, by themselves."""
    steps = (rows.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
    return (rows / steps).round() * steps


def awq(weight: Tensor, rows: Tensor) -> Tensor:
    return awq_scales(weight, rows, rows.abs().mean(0), int4)


def smoothquant(weight: Tensor, rows: Tensor) -> Tensor:
    return smoothquant_scales(weight, rows, rows.abs().amax(0), weight.abs().amax(0))


def output_of_awq(weight: Tensor, rows: Tensor, scales: Tensor) -> Tensor:
    return (rows / scales) @ int4(weight * scales).T


def output_of_smoothquant(weight: Tensor, rows: Tensor, scales: Tensor) -> Tensor:
    return int8(rows / scales) @ int8(weight * scales).T


METHODS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "awq": (awq, output_of_awq),
    "smoothquant": (smoothquant, output_of_smoothquant),
}
methods = pytest.mark.parametrize("method", METHODS)


def loss(method: str, weight: Tensor, rows: Tensor, scales: Tensor | None = None) -> float:
    """The error of the output of a layer that is rounded with these scales, or with none."""
    scales = torch.ones(weight.shape[1]) if scales is None else scales
    return (METHODS[method][1](weight, rows, scales) - rows @ weight.T).norm().item()


def unit(method: str, rows: Tensor, scales: Tensor) -> Tensor:
    """The quantity that is normalized to 1: AWQ's geometric middle, SmoothQuant's shrinking of the largest input."""
    if method == "awq":
        return (scales.amax() * scales.amin()).sqrt()
    fed = rows.abs().amax(0)
    fed = fed.clamp(min=FLOOR * fed.amax()) if fed.any() else torch.ones_like(fed)
    return fed.amax() / (fed / scales).amax()


def sane(method: str, rows: Tensor, scales: Tensor) -> bool:
    return (
        scales.shape == rows.shape[1:]
        and scales.dtype == torch.float32
        and bool((scales > 0).all() and scales.isfinite().all())
        and abs(unit(method, rows, scales).item() - 1) < 1e-5
    )


@pytest.mark.parametrize("seed", range(4))
@methods
def test_the_output_errs_less_than_rounded_without_scales(method: str, seed: int) -> None:
    """On unseen rows, where 4 channels are 32 times the others: by a tenth at least."""
    weight, inputs = correlated(96, 256, 768, seed)
    inputs[:, torch.randperm(256)[:4]] *= 32
    seen, unseen = inputs[:512], inputs[512:]
    scales = METHODS[method][0](weight, seen)
    assert sane(method, seen, scales)
    assert 0 < loss(method, weight, unseen, scales) <= 0.9 * loss(method, weight, unseen)


@pytest.mark.parametrize("seed", range(4))
@methods
def test_on_the_sampled_rows_it_errs_no_more_than_without_scales(method: str, seed: int) -> None:
    """Scales do not help where channels are all alike, or where the weight's columns stand out."""
    torch.manual_seed(seed)
    weight, rows = torch.randn(16, 64), torch.randn(48, 64)
    for each in (weight, weight * torch.randn(64).mul(2).exp()):
        scales = METHODS[method][0](each, rows)
        assert sane(method, rows, scales)
        assert loss(method, each, rows, scales) <= loss(method, each, rows) * (1 + 1e-5)


def assert_best_is_found(method: str, weight: Tensor, rows: Tensor, tried: list[Tensor]) -> None:
    """Among the scales tried, the first of which are none, the method takes those with the least error."""
    losses = [loss(method, weight, rows, each) for each in tried]
    found = METHODS[method][0](weight, rows)
    assert loss(method, weight, rows, found) == pytest.approx(min(losses), rel=1e-4)
    best = losses.index(min(losses))
    assert best > 0
    if sorted(losses)[1] > 1.001 * losses[best]:
        torch.testing.assert_close(found, tried[best], rtol=1e-4, atol=0)


@pytest.mark.parametrize("seed", range(3))
def test_awq_takes_the_best_power_of_the_mean_magnitude(seed: int) -> None:
    weight, rows = correlated(24, 64, 100, seed)
    rows[:, 3] *= 20
    powers = [rows.abs().mean(0).double() ** exponent for exponent in GRID[:-1]]
    tried = [(each / (each.max() * each.min()).sqrt()).float() for each in powers]
    assert_best_is_found("awq", weight, rows, tried)


@pytest.mark.parametrize("seed", range(3))
def test_smoothquant_takes_the_best_power_of_the_largest_magnitudes(seed: int) -> None:
    weight, rows = correlated(24, 64, 100, seed)
    rows[:, 3] *= 100
    x, w = rows.abs().amax(0).double(), weight.abs().amax(0).double()
    powers = [torch.ones_like(x), *(x**exponent / w ** (1 - exponent) for exponent in GRID)]
    tried = [(each / unit("smoothquant", rows.double(), each)).float() for each in powers]
    assert_best_is_found("smoothquant", weight, rows, tried)


@methods
def test_channels_that_are_never_fed(method: str) -> None:
    """Count as 1e-4 of the largest, so that no scale is further from another: norms in float16 hold what is divided."""
    weight, rows = correlated(24, 64, 100, seed=0)
    rows[:, [0, 9]] = 0
    scales = METHODS[method][0](weight, rows)
    assert sane(method, rows, scales)
    assert loss(method, weight, rows, scales) <= loss(method, weight, rows) * (1 + 1e-5)
    assert scales.max() / scales.min() <= 1e4


@methods
@pytest.mark.parametrize("of", ["weight", "rows", "both"])
def test_all_zeros(method: str, of: str) -> None:
    weight, rows = correlated(24, 64, 100, seed=0)
    if of != "rows":
        weight.zero_()
    if of != "weight":
        rows.zero_()
    assert sane(method, rows, METHODS[method][0](weight, rows))


@methods
@pytest.mark.parametrize("of", ["weight", "rows"])
def test_rows_of_zeros_change_nothing(method: str, of: str) -> None:
    weight, rows = correlated(24, 64, 100, seed=0)
    given = {"weight": weight, "rows": rows}
    plain = METHODS[method][0](**given)
    given[of] = torch.cat([given[of], torch.zeros(3, 64)])
    torch.testing.assert_close(METHODS[method][0](**given), plain, rtol=1e-4, atol=0)


@methods
@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_one_channel_far_from_the_others(method: str, factor: float) -> None:
    weight, rows = correlated(24, 64, 100, seed=0)
    rows[:, 11] *= factor
    scales = METHODS[method][0](weight, rows)
    assert sane(method, rows, scales)
    assert loss(method, weight, rows, scales) <= loss(method, weight, rows) * (1 + 1e-5)
    if factor > 1:
        assert loss(method, weight, rows, scales) < 0.9 * loss(method, weight, rows)
        assert scales.argmax() == 11


@methods
def test_channels_of_one_magnitude_have_one_scale(method: str) -> None:
    weight, rows = correlated(24, 64, 100, seed=0)
    rows[:, 3] *= 30
    pairs = rows.abs().amax(0).view(32, 2).amax(1).repeat_interleave(2)
    if method == "awq":
        scales = awq_scales(weight, rows, pairs, int4)
    else:
        columns = weight.abs().amax(0).view(32, 2).amax(1).repeat_interleave(2)
        scales = smoothquant_scales(weight, rows, pairs, columns)
    assert torch.equal(scales[::2], scales[1::2])
    assert scales[2] == scales.max() > scales.min()


@methods
def test_what_rounds_exactly_as_it_is_is_not_scaled(method: str) -> None:
    """Integers whose largest in each row, or group of 32, is the grid's: channels differ, and any scale costs."""
    low, high = (-8, 7) if method == "awq" else (-127, 127)
    weight, rows = torch.randint(low, high, (24, 64)).float(), torch.randint(-127, 127, (48, 64)).float()
    weight[:, 4::4] = (weight[:, 4::4] / 4).round()
    weight[:, ::32], rows[:, 1] = low, 127
    assert torch.equal(METHODS[method][0](weight, rows), torch.ones(64))
    assert loss(method, weight, rows) == 0


@methods
def test_nothing_that_is_given_changes(method: str) -> None:
    weight, rows = correlated(24, 64, 100, seed=0)
    before = weight.clone(), rows.clone()
    METHODS[method][0](weight, rows)
    assert torch.equal(weight, before[0])
    assert torch.equal(rows, before[1])


def test_awq_searches_by_the_rounding_that_it_is_given() -> None:
    """Exact rounding: nothing is gained by any scale, so that none is the best."""
    weight, rows = correlated(24, 64, 100, seed=0)
    calls = []

    def exact(each: Tensor) -> Tensor:
        calls.append(each)
        return each

    awq_scales(weight, rows, rows.abs().mean(0), exact)
    assert len(calls) == 20
    assert torch.equal(calls[0], weight)
    assert output_error(calls[-1], weight, rows) > 0
