"""The trace of a step: launches summed by name, end-to-end time, and idle gaps."""

from __future__ import annotations

from itertools import accumulate
from types import SimpleNamespace, TracebackType
from typing import Any

import pytest
import torch

from fastllama.bench import trace


def test_launches_are_summed_by_name_the_longest_first() -> None:
    durations = [("norm", 2.0), ("matmul", 9.0), ("matmul", 30.0), ("norm", 4.0), ("matmul", 10.0), ("matmul", 11.0)]
    ends = list(accumulate(us for _, us in durations))
    launched = [(name, end - us, end) for (name, us), end in zip(durations, ends, strict=True)]
    assert trace.summed(launched, 2) == [
        {"name": "matmul", "per_step": 2.0, "us": 10.5, "us_per_step": 30.0, "end_to_end_us_per_step": 30.0},
        {"name": "norm", "per_step": 1.0, "us": 3.0, "us_per_step": 3.0, "end_to_end_us_per_step": 3.0},
    ]


def test_end_to_end_each_moment_counts_once() -> None:
    """Overlapping kernels and one that begins late: together the duration of the trace."""
    launched = [("norm", 100.0, 104.0), ("matmul", 101.0, 110.0), ("rope", 113.0, 115.0)]
    found = trace.summed(reversed(launched), 1)  # as they come
    assert [(row["name"], row["us"], row["end_to_end_us_per_step"]) for row in found] == [
        ("matmul", 9.0, 6.0),
        ("rope", 2.0, 5.0),
        ("norm", 4.0, 4.0),
    ]
    assert sum(row["end_to_end_us_per_step"] for row in found) == 115 - 100


def test_what_the_host_does_is_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events of host and device are separated; each step runs inside the profiler, and the device is synchronized."""
    order: list[str] = []

    def event(name: str, kind: str, start: float, end: float) -> Any:
        span = torch.autograd.profiler_util.Interval(start, end)
        return SimpleNamespace(name=name, device_type=getattr(torch.autograd.DeviceType, kind), time_range=span)

    class Profile:
        def __init__(self, activities: list[torch.profiler.ProfilerActivity]) -> None:
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def __enter__(self) -> Profile:
            order.append("enter")
            return self

        def __exit__(
            self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
        ) -> None:
            order.append("exit")

        def events(self) -> list[Any]:
            kernels = [event("decode_kernel", "CUDA", 10.0 * i, 10.0 * i + 4) for i in range(6)]  # 6 idle between
            return [event("cudaGraphLaunch", "CPU", 0, 90), *kernels]

    monkeypatch.setattr(trace, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    found = trace.launches(lambda: order.append("step"), 3)
    (row,) = found
    assert (row["name"], row["per_step"], row["us"], row["us_per_step"]) == ("decode_kernel", 2.0, 4.0, 8.0)
    assert row["end_to_end_us_per_step"] == pytest.approx(54 / 3)
    assert order == ["wait", "enter", "step", "step", "step", "wait", "exit"]
