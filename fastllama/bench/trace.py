"""What a GPU runs in a step, from a trace: each kernel by name, how often, and how long."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def launches(step: Callable[[], object], steps: int) -> list[dict[str, Any]]:
    """`summed` over so many steps on a GPU, kernels inside CUDA graphs included."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as traced:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    events = traced.events() or ()
    on_gpu = (event for event in events if event.device_type.name == "CUDA")
    return summed(((event.name, event.time_range.elapsed_us()) for event in on_gpu), steps)


def summed(launched: Iterable[tuple[str, float]], steps: int) -> list[dict[str, Any]]:
    """Launches, each a name and its microseconds, by name: the one that takes the most of a step first.

    Of each: name, per_step (how many), us (the median of one), us_per_step (of all of them together).
    """
    times: dict[str, list[float]] = {}
    for name, microseconds in launched:
        times.setdefault(name, []).append(microseconds)
    rows = [
        {
            "name": name,
            "per_step": len(each) / steps,
            "us": statistics.median(each),
            "us_per_step": sum(each) / steps,
        }
        for name, each in times.items()
    ]
    return sorted(rows, key=lambda row: -float(row["us_per_step"]))
