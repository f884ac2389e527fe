"""Counters and histograms of a serving engine, as plain values to export."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from fastllama.runtime.outputs import FinishReason

# Seconds: 1, 2.5, 5 per decade, from a decode step of a small model to the longest answer.
BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)


@dataclass(frozen=True)
class HistogramSnapshot:
    """A histogram: counts[i] values lie in (bounds[i-1], bounds[i]]; the last count is of values above all bounds.

    total: the sum of all values, in seconds.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float

    @property
    def count(self) -> int:
        """The number of values."""
        return sum(self.counts)


@dataclass(frozen=True)
class Snapshot:
    """The state of an engine at one moment. Counters and histograms start with the engine.

    num_queued: accepted requests not yet scheduled. num_running: sequences that hold pages.
    num_accepted, num_rejected: requests; rejected ones found the queue full.
    num_failed: requests that raised. num_finished: samples by finish_reason.
    num_prompt_tokens, num_cached_tokens: of scheduled requests; cached ones were found in the prefix cache.
    num_host_hit_tokens: tokens copied back from the host cache, for prompts and recomputed sequences.
    num_preemptions: how often a sequence was preempted, to be recomputed later.
    num_draft_tokens, num_accepted_tokens: draft tokens verified, and draft tokens accepted.
    queue_seconds: from arrival to first_scheduled_time. first_token_seconds: from arrival to the first token.
    inter_token_seconds: between tokens of one sample; tokens of one step count as evenly spaced.
    request_seconds: from arrival to the end, whatever its reason.
    """

    num_queued: int
    num_running: int
    num_pages: int
    num_available_pages: int
    num_accepted: int
    num_rejected: int
    num_failed: int
    num_finished: Mapping[FinishReason, int]
    num_prompt_tokens: int
    num_cached_tokens: int
    num_host_hit_tokens: int
    num_generated_tokens: int
    num_preemptions: int
    num_draft_tokens: int
    num_accepted_tokens: int
    queue_seconds: HistogramSnapshot
    first_token_seconds: HistogramSnapshot
    inter_token_seconds: HistogramSnapshot
    request_seconds: HistogramSnapshot


@dataclass(frozen=True, slots=True)
class Health:
    """Health of an engine's thread.

    alive: whether the thread runs. step_seconds: age of the current step; None between steps. failures_in_a_row: latest
    steps in a row in which every request failed. error: a permanent fault (of the device, or bookkeeping that fails
    every time), after which the thread has ended; None without.
    """

    alive: bool
    step_seconds: float | None
    failures_in_a_row: int
    error: str | None


class Histogram:
    """Counts of values, in seconds, in fixed buckets."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self._total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value that occurred `times` times."""
        self._counts[bisect_left(BOUNDS, value)] += times
        self._total += value * times

    def snapshot(self) -> HistogramSnapshot:
        """Returns the counts so far."""
        return HistogramSnapshot(BOUNDS, tuple(self._counts), self._total)


@dataclass
class Statistics:
    """The counters of a Snapshot, guarded by `lock`."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    num_accepted: int = 0
    num_rejected: int = 0
    num_failed: int = 0
    num_finished: Counter[FinishReason] = field(default_factory=Counter)
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_host_hit_tokens: int = 0
    num_generated_tokens: int = 0
    num_preemptions: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    queue_seconds: Histogram = field(default_factory=Histogram)
    first_token_seconds: Histogram = field(default_factory=Histogram)
    inter_token_seconds: Histogram = field(default_factory=Histogram)
    request_seconds: Histogram = field(default_factory=Histogram)

    def snapshot(self, *, num_queued: int, num_running: int, num_pages: int, num_available_pages: int) -> Snapshot:
        """Returns all counters as immutable values, with the given gauges."""
        return Snapshot(
            num_queued=num_queued,
            num_running=num_running,
            num_pages=num_pages,
            num_available_pages=num_available_pages,
            num_accepted=self.num_accepted,
            num_rejected=self.num_rejected,
            num_failed=self.num_failed,
            num_finished=dict(self.num_finished),
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=self.num_cached_tokens,
            num_host_hit_tokens=self.num_host_hit_tokens,
            num_generated_tokens=self.num_generated_tokens,
            num_preemptions=self.num_preemptions,
            num_draft_tokens=self.num_draft_tokens,
            num_accepted_tokens=self.num_accepted_tokens,
            queue_seconds=self.queue_seconds.snapshot(),
            first_token_seconds=self.first_token_seconds.snapshot(),
            inter_token_seconds=self.inter_token_seconds.snapshot(),
            request_seconds=self.request_seconds.snapshot(),
        )
