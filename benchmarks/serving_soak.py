"""Soak test of `fastllama serve`: 10,000 clients, many of which misbehave, at four times its capacity.

python -m benchmarks.serving_soak [--requests 10000] [--seed 0]

The server has few seats (sequences that run at once), a short queue and short timeouts. First as many clients as seats,
then four times as many: they behave, leave (reset, close, half-close; during upload, queued, in the stream), stall
(never read, slow headers, slow bodies), or send invalid JSON or bytes that are not HTTP
(benchmarks/serving/behaviours.py). The exit status is 1 if

- an answer is wrong, has status 5xx, or is a 429 whose Retry-After is not 1 to 120 s, a slow client is not cut off, or
  a request runs on after its client left;
- at the end a request or KV page is still in use, or there are more descriptors, threads, asyncio tasks or request
  objects than at the start;
- between the middle and the end resident memory grows by more than GROWTH, or Python's blocks by more than BLOCKS;
- p99 of the gaps between reads of whole streams is more than SLOWDOWN times that of the phases before and after, which
  have as many clients as seats, all of which behave;
- the server writes a traceback, or does not exit with status 0 on SIGTERM.

Client and server share the machine, so the gaps include the client's own delays. Needs Linux's /proc.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from benchmarks.serving.behaviours import MIXED, WELL_BEHAVED, Behaviour, Outcome, call, send_everything
from benchmarks.serving.process import ServerProcess, State
from benchmarks.serving.samples import percentile
from benchmarks.serving.settings import Settings

SEATS = 8  # sequences that run at once
STALLS = 2.0  # seconds a client may take for its headers, a chunk of its body, or a read
SETTINGS = Settings(
    llm={"max_num_seqs": SEATS, "max_model_len": 256, "kv_cache_tokens": 2048, "page_size": 16},
    stall_seconds=STALLS,
)
OPTIONS = ("--max-queue-size", str(SEATS), "--max-body-bytes", str(1 << 20), "--drain-timeout", "10")
OVERLOAD = 4  # times as many clients as seats
WARM_UP = 500  # clients before the first count, at most a tenth of all
GROWTH = 16.0  # MB between the middle and the end: 4 to 10 of 10,000 clients, most in steps of shapes that came late
BLOCKS = 8000  # of Python's, between the same: 2000 for each captured step of a new shape, 3000 of 10,000 clients
SLOWDOWN = 1.5


@dataclass
class Soak:
    """Outcomes of the clients, and the server's state between phases."""

    outcomes: list[Outcome] = field(default_factory=list)
    states: dict[str, State] = field(default_factory=dict)
    alone: list[float] = field(default_factory=list)  # gaps with as many clients as seats
    crowded: list[float] = field(default_factory=list)
    aborted: float = 0.0  # samples of requests whose client left
    log: str = ""
    exit_status: int = 0

    def faults(self, *, measured: bool = True) -> list[str]:
        """Returns the faults. measured: also those of time and memory, for thousands of clients on a quiet machine."""
        counts = Counter(f"{each.behaviour}: {each.fault}" for each in self.outcomes if each.fault is not None)
        found = [f"{count} times {fault}" if count > 1 else fault for fault, count in counts.items()]
        start, middle, end = (self.states[place] for place in ("start", "middle", "end"))
        found += [f"at the {place} is left: {state}" for place, state in self.states.items() if state.busy]
        found += [
            f"there were {getattr(start, name)} {name}, and at the end are {getattr(end, name)}"
            for name in ("descriptors", "threads")
            if getattr(end, name) > getattr(start, name)
        ]
        more = {name: count - start.objects[name] for name, count in end.objects.items() if count > start.objects[name]}
        if more:
            found.append(f"at the end live more than at the start: {more}")
        if measured and end.megabytes > middle.megabytes + GROWTH:
            found.append(f"memory grew from {middle.megabytes:.1f} to {end.megabytes:.1f} MB after the middle")
        if measured and end.blocks > middle.blocks + BLOCKS:
            found.append(f"Python's blocks grew from {middle.blocks} to {end.blocks} after the middle")
        if measured and self.slowdown > SLOWDOWN:
            found.append(f"p99 of the gaps is {self.slowdown:.2f} times that at capacity, above {SLOWDOWN}")
        left = sum((each.behaviour, each.ending) == ("leave_stream", "left") for each in self.outcomes)
        if self.aborted < left / 2:
            found.append(f"{left} clients left in their stream, and {self.aborted:.0f} samples were aborted")
        kept = sum(each.behaviour == "never_read" and each.ending == "200" for each in self.outcomes)
        if kept:
            found.append(f"{kept} clients that did not read were waited for")
        if "Traceback" in self.log:
            found.append(f"the server wrote a traceback: ...{self.log[self.log.index('Traceback') :][:3000]}")
        if self.exit_status:
            found.append(f"the server ended with status {self.exit_status}")
        return found

    @property
    def slowdown(self) -> float:
        """p99 of the gaps at four times the capacity, relative to that at capacity."""
        return percentile(self.crowded, 99) / percentile(self.alone, 99)

    def tables(self) -> Iterator[str]:
        """Lines of the tables: outcomes of the clients, states of the server, gaps."""
        yield f"{'client':14} {'count':>6} {'p50 s':>7} {'p99 s':>7}  endings"
        for name in sorted({each.behaviour for each in self.outcomes}):
            of_it = [each for each in self.outcomes if each.behaviour == name]
            seconds = [each.seconds for each in of_it]
            counted = Counter(each.ending for each in of_it).most_common()
            endings = ", ".join(f"{ending} {count}" for ending, count in counted)
            yield f"{name:14} {len(of_it):6} {percentile(seconds, 50):7.3f} {percentile(seconds, 99):7.3f}  {endings}"
        columns = f"{'objects':>7} {'descriptors':>11} {'threads':>7} {'running':>7} {'waiting':>7} {'pages':>6}"
        yield f"\n{'server':14} {'RSS MB':>8} {'blocks':>8} {columns}"
        for place, state in self.states.items():
            objects = sum(state.objects.values())
            counts = f"{objects:7} {state.descriptors:11} {state.threads:7} {state.running:7.0f} {state.waiting:7.0f}"
            yield f"{place:14} {state.megabytes:8.1f} {state.blocks:8} {counts} {state.pages:6.1%}"
        yield f"\n{'gaps':14} {'count':>8} {'p50 ms':>8} {'p99 ms':>8}"
        for place, gaps in (("at capacity", self.alone), (f"{OVERLOAD} x capacity", self.crowded)):
            yield f"{place:14} {len(gaps):8} {1e3 * percentile(gaps, 50):8.2f} {1e3 * percentile(gaps, 99):8.2f}"
        yield f"{'ratio of p99':14} {self.slowdown:26.2f}\n"


async def phase(port: int, chosen: Sequence[Behaviour], at_once: int, rng: random.Random) -> list[Outcome]:
    """Run the given clients, at most `at_once` at a time."""
    calls = iter(chosen)

    async def one_after_another() -> list[Outcome]:
        return [await call(behaviour, port, rng, STALLS) for behaviour in calls]

    return list(chain(*await asyncio.gather(*(one_after_another() for _ in range(at_once)))))


def gaps_of(outcomes: Sequence[Outcome]) -> list[float]:
    """Returns the gaps between reads of all streams that were read to the end."""
    return [gap for outcome in outcomes for gap in outcome.gaps]


def settled(server: ServerProcess, start: State | None) -> State:
    """Returns the server's state once it is idle with no connections, or after half a minute."""
    give_up = time.monotonic() + 30
    while True:
        state = server.state()
        idle = not state.busy and (start is None or _is_down_to(state, start))
        if idle or time.monotonic() > give_up:
            return state
        time.sleep(0.1)


def _is_down_to(state: State, start: State) -> bool:
    return state.descriptors <= start.descriptors and sum(state.objects.values()) <= sum(start.objects.values())


def soak(requests: int, seed: int = 0) -> Soak:
    """Run the phases: warm-up, a tenth that behave, two halves of all kinds, a tenth that behave, shutdown."""
    which, rng, found = random.Random(seed), random.Random(seed), Soak()  # two: how many numbers a client uses varies

    def run(kinds: Mapping[Behaviour, int], count: int, at_once: int) -> list[float]:
        chosen = which.choices(list(kinds), weights=list(kinds.values()), k=count)
        outcomes = asyncio.run(phase(server.port, chosen, at_once, rng))
        found.outcomes += outcomes
        return gaps_of(outcomes)

    few, half = requests // 10, (requests - 2 * (requests // 10)) // 2
    with ServerProcess(SETTINGS, OPTIONS) as server:
        run({send_everything: 1}, 1, 1)
        run(MIXED, min(WARM_UP, few), OVERLOAD * SEATS)
        start = found.states["start"] = settled(server, None)
        found.alone += run(WELL_BEHAVED, few, SEATS)
        for place in ("middle", "end"):
            found.crowded += run(MIXED, half, OVERLOAD * SEATS)
            found.states[place] = settled(server, start)
        found.alone += run(WELL_BEHAVED, few, SEATS)
        found.aborted = server.metric("request_success_total", 'finished_reason="abort"')
        found.exit_status, found.log = server.end(), server.log
    return found


def main() -> None:
    """Soak, print the tables and the faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000, help="requests of all phases together (default 10000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the clients' random choices (default 0)")
    asked = parser.parse_args()
    found = soak(asked.requests, asked.seed)
    print(*found.tables(), sep="\n")
    wrong = found.faults()
    print(*wrong, sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
