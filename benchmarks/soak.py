"""Soak test of the runtime: 10,000 requests of every kind; no object may be left, and memory may not grow.

python -m benchmarks.soak [--requests 10000] [--configuration NAME ...]

The bundled model answers through LLM and AsyncEngine in turn, in every configuration: whole answers, streams that are
read, closed, cancelled and dropped, forks, aborts, deadlines, requests that fail, with every option of SamplingParams.
After a warm-up, in the middle and at the end it counts resident memory, live request objects and entries of the
runtime's tables. The exit status is 1 if memory grows by more than GROWTH between the middle and the end, or an object
or entry is left. Needs Linux's /proc. A request that ends in the wrong way raises.

The ops' caches of earlier calls are cleared before each count: they are bounded, but fill only after some 100,000
requests.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import os
import random
import sys
import threading
import time
from collections import Counter
from concurrent import futures
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.mixed_requests import Callers, Faults, serve
from benchmarks.speculation import Always
from fastllama import LLM
from fastllama.kernels.dispatch.op import OPS
from fastllama.runtime.generation import Generation
from fastllama.runtime.planning.sequence import Request, Sequence
from fastllama.runtime.serving.async_engine import RequestStream
from fastllama.runtime.serving.mailbox import Mailbox
from fastllama.runtime.serving.order import Order

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "prompt lookup": {"speculation": "prompt_lookup"},
    "draft model": {"speculation": "tiny"},
    "host cache": {"host_cache_tokens": 1024},
    "int8 cache": {"kv_cache_dtype": "int8"},
}
# Few enough pages that running requests are preempted, few enough seats that others wait.
SIZES = {"max_model_len": 96, "page_size": 16, "kv_cache_tokens": 512, "max_num_seqs": 8, "max_num_batched_tokens": 64}
KINDS = (Generation, Request, Sequence, Order, Mailbox, RequestStream, asyncio.Future, futures.Future)
GROWTH = 8.0  # MB between the middle and the end: captured steps and fragmentation took 0.4 to 4.2 with 10,000 requests
WARM_UP = 500  # requests before the first count, at most a tenth of all
ROUND = 50  # requests through one AsyncEngine, or one after another through the LLM


@dataclass(frozen=True)
class Count:
    """State without any request: megabytes, objects and threads beyond those at the start, entries of tables."""

    requests: int
    megabytes: float
    objects: dict[str, int]
    entries: dict[str, int]

    @property
    def left(self) -> dict[str, int]:
        """Objects and entries that should be gone."""
        return {name: count for name, count in (self.objects | self.entries).items() if count}


class Soak:
    """Rounds of requests through one LLM: by AsyncEngine or LLM, with a model that fails or is captured."""

    def __init__(self, llm: LLM, seed: int = 0) -> None:
        self._llm, self._rng, self._before = llm, random.Random(seed), alive()
        self._num_rounds = self._num_requests = self._num_orders = 0
        if llm.engine.speculation is not None:
            llm.engine.speculation._pace = Always(llm.engine.speculation.count)

    def run(self, count: int) -> Count:
        """Run that many more requests, and count afterwards."""
        for first in range(0, count, ROUND):
            self._round(min(ROUND, count - first))
        return self._count()

    def _round(self, count: int) -> None:
        model_fails, serves = self._num_rounds % 4 < 2, self._num_rounds % 2 == 0
        self._num_rounds += 1
        self._num_requests += count
        with Faults(self._llm) if model_fails else nullcontext():
            if serves:
                self._num_orders += asyncio.run(serve(self._llm, self._rng, count, model_fails=model_fails))
            else:
                Callers(self._llm, self._rng, model_fails=model_fails).run(count)

    def _count(self) -> Count:
        found = alive()
        found.subtract(self._before)
        engine = self._llm.engine
        entries = {
            "requests": len(engine._requests.generations) + engine.scheduler.num_waiting + engine.scheduler.num_running,
            "pages": engine.pool.num_pages - engine.pool.num_available,
            "adjusted": len(engine._runner.adjustments._slots),
            "orders": self._num_orders,
        }
        if engine.speculation is not None:
            kept = vars(engine.speculation.drafter).values()
            entries["drafts"] = sum(len(each) for each in kept if isinstance(each, dict))
        return Count(self._num_requests, resident_megabytes(), dict(found), entries)


def alive() -> Counter[str]:
    """Live request objects by class, and engine threads, which end a moment after their shutdown."""
    patience = time.monotonic() + 5
    while (threads := _num_threads()) and time.monotonic() < patience:
        time.sleep(0.01)
    for _ in range(2):  # an object that a finalizer puts into an unreachable queue lives until the next collection
        gc.collect()
    found = Counter(type(each).__name__ for each in gc.get_objects() if issubclass(type(each), KINDS))
    return found + Counter(threads=threads)


def _num_threads() -> int:
    return sum(thread.name.startswith("fastllama-") for thread in threading.enumerate())


def resident_megabytes() -> float:
    """Resident memory of the process, after the ops' caches are cleared and the allocator has trimmed its heap."""
    for op in OPS.values():
        op._known.clear()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def soak(configuration: str, requests: int) -> list[Count]:
    """Returns the counts after the warm-up, in the middle and at the end of that many requests."""
    first = min(WARM_UP, requests // 10)
    half = (requests - first) // 2
    with LLM("tiny", progress=False, **SIZES, **CONFIGURATIONS[configuration]) as llm:
        run = Soak(llm)
        return [run.run(count) for count in (first, half, requests - first - half)]


def faults(counts: list[Count]) -> list[str]:
    """Returns the faults: memory that grew between the middle and the end, and objects left of requests."""
    _, middle, end = counts
    growth = end.megabytes - middle.megabytes
    grown = [f"memory grew by {growth:.1f} MB, which is more than {GROWTH:.1f}"] if growth > GROWTH else []
    return grown + [f"behind {count.requests} requests are left: {count.left}" for count in counts if count.left]


def main() -> None:
    """Soak, print the table and the faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000, help="in each configuration")
    parser.add_argument("--configuration", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    wrong = []
    print(f"{'':24} {'requests':>8} {'RSS MB':>8} {'objects':>8} {'entries':>8}")
    for name in options.configuration:
        counts = soak(name, options.requests)
        for place, count in zip(("start", "middle", "end"), counts, strict=True):
            objects, entries = sum(count.objects.values()), sum(count.entries.values())
            where = f"{name}, {place}"
            print(f"{where:24} {count.requests:8} {count.megabytes:8.1f} {objects:8} {entries:8}", flush=True)
        wrong += [f"{name}: {fault}" for fault in faults(counts)]
    print(*wrong, sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
