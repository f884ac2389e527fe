"""Timing of calls: contenders take turns, the L2 cache is cold, and every sample is kept.

A sampler is a function that runs its work once and returns seconds per call.
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
    """Wall-clock time on the host: of the work on a CPU, of the launch only on a GPU."""

    def sample() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls

    return sample


def rotating(function: Callable[[Any], Any], sets: Sequence[Any]) -> Call:
    """A call that cycles through several inputs."""
    number = 0

    def call() -> None:
        nonlocal number
        function(sets[number % len(sets)])
        number += 1

    return call


def queued(work: Call, before: Call = lambda: None) -> Sampler:
    """GPU time between events before and after `work`, all of it queued before the GPU begins.

    The GPU sleeps while the host queues: otherwise a call of five launches would include the host's gaps between them,
    and a graph part of its launch. Where the sleep was too short, the sample is repeated with twice the sleep, kept for
    later samples, up to LONGEST_SLEEP: a call that synchronizes can never be queued.
    before: called before the sleep.
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
    """GPU time of one eager call with a cold L2 cache, `queued`.

    `scratch`, larger than the cache, is read before. If it were written, its lines would be written back during the
    call: 50 MB take as long as the call itself may.
    """
    seen = scratch.new_empty(())
    return queued(call, before=lambda: torch.amax(scratch, dim=0, out=seen))


def graph(call: Call, calls: int) -> Sampler:
    """GPU time per call of `calls` calls captured in one CUDA graph and replayed, `queued`: without host time.

    The cache is cold where `call` rotates through more than it holds. All calls run once before, so that a peer's
    preparation at the first call of each set of inputs is not captured. Raises RuntimeError where capture fails.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # capture needs a warm-up on its stream
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
    """Samples of each, one per round after a warm-up round, so that a drifting clock affects all alike.

    At least one round; none starts after `seconds`.
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
    """The 10th percentile, the median and the 90th percentile."""
    tenths = statistics.quantiles(seconds, n=10) if len(seconds) > 1 else [seconds[0]] * 9
    return {"p10": tenths[0], "median": statistics.median(seconds), "p90": tenths[8]}
