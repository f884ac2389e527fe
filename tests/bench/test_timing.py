"""Timing: turns, warm-up, rotation and quantiles."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

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
    """Otherwise what a peer prepares at its first call would be replayed, and timed, with the call."""
    seen: list[str] = []
    cuda = MagicMock()
    cuda.graph.return_value.__enter__.side_effect = lambda: seen.append("captured")
    monkeypatch.setattr(timing.torch, "cuda", cuda)
    timing.graph(timing.rotating(seen.append, "abcde"), 5)
    assert seen == [*"abcde", "captured", *"abcde"]


class Device:
    """A GPU and its host, in seconds of one clock: launches run in order, and the host goes on meanwhile."""

    def __init__(self) -> None:
        self.host, self.free = 0.0, 0.0
        self.slept: list[int] = []

    def launch(self, seconds: float, host: float = 10e-6) -> None:
        self.host += host
        self.free = max(self.free, self.host) + seconds

    def wait(self) -> None:
        self.host = max(self.host, self.free)

    def _sleep(self, cycles: int) -> None:
        self.slept.append(cycles)
        self.launch(cycles * 0.6e-9)

    def Event(self, enable_timing: bool) -> Any:
        """One that is recorded when the GPU comes to it."""
        event = SimpleNamespace(at=0.0)

        def record() -> None:
            event.at = max(self.free, self.host)

        def synchronize() -> None:
            self.host = max(self.host, event.at)

        event.record, event.synchronize = record, synchronize
        event.query = lambda: event.at <= self.host
        event.elapsed_time = lambda end: 1e3 * (end.at - event.at)
        return event


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    found = Device()
    monkeypatch.setattr(timing.torch, "cuda", found)
    return found


def test_the_hosts_gaps_between_launches_are_not_timed(device: Device) -> None:
    """Twenty launches of 1 us, each of which takes the host ten."""

    def call() -> None:
        for _ in range(20):
            device.launch(1e-6)

    sample = timing.queued(call)
    assert sample() == pytest.approx(20e-6)
    assert device.slept[0] == timing.SHORTEST_SLEEP < device.slept[-1]
    tried = len(device.slept)
    assert sample() == pytest.approx(20e-6)
    assert device.slept[tried:] == [device.slept[-1]]  # begins with what was enough


def test_a_call_that_waits_for_the_device_is_timed_all_the_same(device: Device) -> None:
    def call() -> None:
        device.launch(1e-6)
        device.wait()

    assert timing.queued(call)() > 0
    assert device.slept[-1] == timing.LONGEST_SLEEP


def test_the_cache_is_emptied_by_reading(device: Device) -> None:
    """Dirty cache lines would be written back to memory while the call is timed."""
    scratch = torch.arange(100, dtype=torch.int8)
    version = scratch._version
    assert timing.events(lambda: device.launch(3e-6), scratch)() == pytest.approx(3e-6)
    assert scratch._version == version


def test_a_replayed_graph_is_timed_by_the_call(monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
    """Less the rest of its launch, which takes the host 60 us."""
    cuda = MagicMock(Event=device.Event, _sleep=device._sleep)
    cuda.CUDAGraph.return_value.replay = lambda: device.launch(40e-6, host=60e-6)
    monkeypatch.setattr(timing.torch, "cuda", cuda)
    assert timing.graph(lambda: None, 20)() == pytest.approx(2e-6)


@pytest.mark.parametrize(
    ("seconds", "p10", "median", "p90"), [([3.0], 3.0, 3.0, 3.0), (list(range(1, 20)), 2.0, 10.0, 18.0)]
)
def test_quantiles(seconds: list[float], p10: float, median: float, p90: float) -> None:
    assert timing.quantiles(seconds) == {"p10": p10, "median": median, "p90": p90}
