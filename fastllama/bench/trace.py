"""Traces a step on a GPU: each kernel's name, count and duration."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Span = tuple[str, float, float]  # name, begin and end in microseconds


def launches(step: Callable[[], object], steps: int) -> list[dict[str, Any]]:
    """`summed` over `steps` traced steps on a GPU, kernels inside CUDA graphs included."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as traced:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    events = traced.events() or ()
    on_gpu = (event for event in events if event.device_type.name == "CUDA")
    return summed(((event.name, event.time_range.start, event.time_range.end) for event in on_gpu), steps)


def summed(launched: Iterable[Span], steps: int) -> list[dict[str, Any]]:
    """Launches by name, by descending end-to-end time per step.

    Each has name, per_step (count), us (median duration of one), us_per_step (sum of durations) and
    end_to_end_us_per_step. A kernel under programmatic dependent launch begins before the previous one ends, so that
    durations overlap and add up to more than the step. End-to-end time is counted from the end of the previous kernel
    to its own end: these times add up to the trace, idle time before a launch included.
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
