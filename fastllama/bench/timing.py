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
SHORTEST_SLEEP, LONGEST_SLEEP = 1 << 15, 1 << 23  # cycles, about 20 us and 5 ms
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


def queued(work: Call, before: Call = lambda: None) -> Sampler:
    """Time on the GPU between two events around `work`, all of which the host has queued before the GPU begins it.

    The GPU sleeps meanwhile: a call of five launches would else be measured with the host's gaps between them, and a
    graph with what is left of its launch. Where it woke too early the sample is taken again with twice the sleep, which
    the next ones begin with, up to LONGEST_SLEEP: a call that waits for the GPU itself can never be queued.
    before: what precedes the sleep.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cycles = SHORTEST_SLEEP

    def sample() -> float:
        nonlocal cycles
        while True:
            before()
            torch.cuda._sleep(cycles)
            begin.record()
            work()
            end.record()
            in_time = not begin.query()
            end.synchronize()
            if in_time or cycles >= LONGEST_SLEEP:
                return float(begin.elapsed_time(end)) / 1e3
            cycles *= 2

    return sample


def events(call: Call, scratch: torch.Tensor) -> Sampler:
    """Time on the GPU of one eager call behind a cold L2 cache, `queued`.

    `scratch`, larger than the cache, is read before. Written, its lines would go back to memory while the call is
    timed: 50 MB take as long as the call itself may.
    """
    seen = scratch.new_empty(())
    return queued(call, before=lambda: torch.amax(scratch, dim=0, out=seen))


def graph(call: Call, calls: int) -> Sampler:
    """Time on the GPU for each of `calls` calls captured in one CUDA graph and replayed, `queued`: no host in between.

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
    sample = queued(captured.replay)
    return lambda: sample() / calls


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
