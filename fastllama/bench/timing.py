"""How calls are timed: what is compared takes turns, nothing is found in the cache, and every sample is kept.

A sampler is a function that runs something once and returns seconds for each call of it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Call = Callable[[], Any]
Sampler = Callable[[], float]
Generation = dict[str, float]  # seconds: "prefill" until the first token, "decode" from there to the last


def wall(call: Call, calls: int = 1) -> Sampler:
    """Wall-clock time on the host: of the work itself on a CPU, of nothing but the launch on a GPU."""

    def sample() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls

    return sample


def rotating(function: Callable[[Any], Any], sets: Sequence[Any]) -> Call:
    """A call that takes the next of several inputs each time."""
    number = 0

    def call() -> None:
        nonlocal number
        function(sets[number % len(sets)])
        number += 1

    return call


def events(call: Call, scratch: torch.Tensor) -> Sampler:
    """Time on the GPU between two events around one eager call.

    `scratch`, larger than the L2 cache, is written before: the cache is cold, and the host has queued the call by the
    time the GPU reaches it, so that what is measured is the GPU.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        scratch.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    return sample


def graph(call: Call, calls: int) -> Sampler:
    """Time on the GPU for each of `calls` calls captured in one CUDA graph and replayed: no host in between.

    Cold where `call` rotates through more than the L2 cache holds. All calls are made once before, so that what a peer
    prepares at its first call of each set of inputs is not captured. Raises RuntimeError where capture fails.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # capture wants its stream warm
        for _ in range(calls):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for _ in range(calls):
            call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        begin.record()
        captured.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / calls

    return sample


def in_turns(samplers: Mapping[str, Sampler], rounds: int, seconds: float = float("inf")) -> dict[str, list[float]]:
    """Samples of each, one a round after a round of warm-up, so that a machine whose speed drifts hurts all alike.

    At least one round, and no new one after `seconds`.
    """
    taken: dict[str, list[float]] = {name: [] for name in samplers}
    start = time.monotonic()
    for number in range(rounds + 1):
        for name, sample in samplers.items():
            duration = sample()
            if number:
                taken[name].append(duration)
        if number and time.monotonic() - start > seconds:
            break
    return taken


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """The tenth, the median and the ninetieth percentile."""
    tenths = statistics.quantiles(seconds, n=10) if len(seconds) > 1 else [seconds[0]] * 9
    return {"p10": tenths[0], "median": statistics.median(seconds), "p90": tenths[8]}
