"""Timing: turns, warm-up, rotation and quantiles."""

from __future__ import annotations

import time
from unittest.mock import MagicMock

import pytest

from fastllama.bench import timing


def test_contenders_take_turns_and_the_first_round_is_dropped() -> None:
    order: list[str] = []

    def sampler(name: str, first: float) -> timing.Sampler:
        values = iter(first + i for i in range(9))

        def sample() -> float:
            order.append(name)
            return next(values)

        return sample

    taken = timing.in_turns({"a": sampler("a", 0.0), "b": sampler("b", 10.0)}, rounds=2)
    assert order == ["a", "b"] * 3
    assert taken == {"a": [1.0, 2.0], "b": [11.0, 12.0]}


def test_no_round_begins_after_the_time_is_up() -> None:
    taken = timing.in_turns({"a": lambda: time.sleep(0.02) or 1.0}, rounds=1000, seconds=0.05)
    assert 1 <= len(taken["a"]) < 5


def test_wall_is_the_time_of_one_call() -> None:
    count = 0

    def call() -> None:
        nonlocal count
        count += 1
        time.sleep(0.002)

    assert 0.002 <= timing.wall(call, calls=5)() < 0.2
    assert count == 5


def test_rotation_meets_every_set_in_turn() -> None:
    seen: list[str] = []
    call = timing.rotating(seen.append, "abc")
    for _ in range(5):
        call()
    assert seen == list("abcab")


def test_every_set_is_met_before_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or what a peer prepares for a set at its first call would be replayed, and timed, with the call."""
    seen: list[str] = []
    cuda = MagicMock()
    cuda.graph.return_value.__enter__.side_effect = lambda: seen.append("captured")
    monkeypatch.setattr(timing.torch, "cuda", cuda)
    timing.graph(timing.rotating(seen.append, "abcde"), 5)
    assert seen == [*"abcde", "captured", *"abcde"]


@pytest.mark.parametrize(
    ("seconds", "p10", "median", "p90"), [([3.0], 3.0, 3.0, 3.0), (list(range(1, 20)), 2.0, 10.0, 18.0)]
)
def test_quantiles(seconds: list[float], p10: float, median: float, p90: float) -> None:
    assert timing.quantiles(seconds) == {"p10": p10, "median": median, "p90": p90}
