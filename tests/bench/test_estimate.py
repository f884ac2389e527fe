"""The estimate of a benchmark's cost: sizes match the models that are made, and a machine gets a shape that fits."""

from __future__ import annotations

import pytest
import torch

from fastllama.bench import estimate, models
from fastllama.bench.estimate import Rates, Work, largest_shape
from fastllama.layers.quantization import NONE, WORDS

CPU = torch.device("cpu")


def work(shape: str = "tiny", **changes: object) -> Work:
    options = {"kinds": [NONE], "batch": [1], "context": [512], "steps": 135} | changes
    return Work.of(models.shape(shape, 512), torch.bfloat16, torch.bfloat16, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", WORDS)
def test_weights_are_about_as_large_as_those_that_are_made(kind: str) -> None:
    made = models.random_model(models.shape("tiny", 64), kind, torch.bfloat16, CPU)
    assert work(kinds=[kind]).weight_bytes == pytest.approx(models.kept_bytes(made), rel=0.1)


@pytest.mark.parametrize(("shape", "gigabytes"), [("1.1b", 2.2), ("7b", 13.5), ("13b", 26.0), ("70b", 138.0)])
def test_the_shapes_are_as_large_as_published(shape: str, gigabytes: float) -> None:
    assert work(shape).weight_bytes / 1e9 == pytest.approx(gigabytes, rel=0.01)


def test_prompts_steps_and_keys_are_counted_by_hand() -> None:
    found = work(kinds=[NONE, "int8"], batch=[1, 8], context=[200, 300], steps=20)
    assert found.prompt_tokens == 2 * 9 * ((200 - 21) + (300 - 21))
    assert found.steps == 2 * 4 * 20
    assert found.kv_bytes == 8 * 300 * 2560  # 5 layers of 2 x 2 heads of 64 numbers in 2 bytes


@pytest.mark.parametrize(
    ("gigabytes", "rates", "shape"),
    [
        (1.0, Rates(1e11, 2e10), "tiny"),
        (8.0, Rates(1e11, 2e10), "1.1b"),
        (20.0, Rates(1e13, 2e11), "7b"),
        (20.0, Rates(1e11, 2e10), "1.1b"),  # a 7b would fit, and take more than PATIENCE
        (20.0, Rates(1e8, 2e10), "tiny"),
        (200.0, Rates(1e14, 2e12), "13b"),
        (8.0, None, "1.1b"),
        (80.0, None, "7b"),
        (800.0, None, "7b"),
    ],
)
def test_the_shape_is_the_largest_that_fits_and_takes_some_minutes(
    monkeypatch: pytest.MonkeyPatch, gigabytes: float, rates: Rates | None, shape: str
) -> None:
    monkeypatch.setattr(estimate, "available_bytes", lambda device: gigabytes * 1e9)
    assert largest_shape(CPU, lambda name: work(name, batch=[1, 8]), rates) == shape


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.2, "1 second"), (40, "40 seconds"), (120, "2 minutes"), (3600, "60 minutes"), (9000, "2 hours")],
)
def test_a_time_has_a_fitting_unit(seconds: float, shown: str) -> None:
    assert estimate._duration(seconds) == shown
