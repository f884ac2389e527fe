"""What a GPU runs in a step, from a trace: each kernel by name, how often, and how long."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Span = tuple[str, float, float]  # name, begin and end in microseconds


def launches(step: Callable[[], object], steps: int) -> list[dict[str, Any]]:
    """`summed` over so many steps on a GPU, kernels inside CUDA graphs included."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as traced:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    events = traced.events() or ()
    on_gpu = (event for event in events if event.device_type.name == "CUDA")
    return summed(((event.name, event.time_range.start, event.time_range.end) for event in on_gpu), steps)


def summed(launched: Iterable[Span], steps: int) -> list[dict[str, Any]]:
    """Launches by name: the one that takes the most of a step, end to end, first.

    Of each: name, per_step (how many), us (the median duration of one), us_per_step (the durations of all of them) and
    end_to_end_us_per_step. A kernel under programmatic dependent launch begins while the one before it runs, so that
    durations overlap and add up to more than the step. From the end before it to its own end each moment counts once:
    these add up to the trace, what stood idle before a launch included.
    """
    durations: dict[str, list[float]] = {}
    advanced: dict[str, float] = {}
    before: float | None = None
    for name, begin, end in sorted(launched, key=lambda span: span[2]):
        durations.setdefault(name, []).append(end - begin)
        advanced[name] = advanced.get(name, 0.0) + end - (begin if before is None else before)
        before = end
    rows = [
        {
            "name": name,
            "per_step": len(each) / steps,
            "us": statistics.median(each),
            "us_per_step": sum(each) / steps,
            "end_to_end_us_per_step": advanced[name] / steps,
        }
        for name, each in durations.items()
    ]
    return sorted(rows, key=lambda row: -float(row["end_to_end_us_per_step"]))
