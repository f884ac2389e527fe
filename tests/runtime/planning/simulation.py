"""A scheduler on a virtual clock: a step's duration follows from its tokens, so latencies are exact and free."""

from __future__ import annotations

import itertools
import math
import random
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from fastllama.runtime.params import SamplingParams
from fastllama.runtime.planning.block_pool import BlockPool
from fastllama.runtime.planning.scheduler import Scheduler
from fastllama.runtime.planning.sequence import Request, Sequence


@dataclass(frozen=True)
class Arrival:
    """A prompt of `length` tokens, like no other, that comes at `time` (seconds) and is answered with `answer`."""

    time: float
    length: int
    answer: int


@dataclass
class Served:
    """When its tokens were there."""

    arrival: Arrival
    times: list[float] = field(default_factory=list)

    @property
    def first_token_seconds(self) -> float:
        return self.times[0] - self.arrival.time

    @property
    def inter_token_seconds(self) -> list[float]:
        return [after - before for before, after in itertools.pairwise(self.times)]


class Server:
    """A step takes FIXED seconds and PER_TOKEN for each token: 0.21 s for 2048, as an A100 may take for a 7B."""

    FIXED, PER_TOKEN = 0.005, 0.0001

    def __init__(self, budget: int, *, seqs: int = 64, num_pages: int = 6000, page_size: int = 64) -> None:
        limit = num_pages * page_size
        self.scheduler = Scheduler(
            BlockPool(num_pages, page_size), max_num_batched_tokens=budget, max_num_seqs=seqs, max_model_len=limit
        )
        self.now = 0.0
        self.ends: list[float] = []  # of steps
        self._tokens = itertools.count()
        self._served: dict[Request, Served] = {}

    @classmethod
    def seconds(cls, num_tokens: int) -> float:
        """Seconds of a step of so many tokens."""
        return cls.FIXED + cls.PER_TOKEN * num_tokens

    def serve(self, arrivals: Iterable[Arrival], until: float = float("inf")) -> list[Served]:
        """Everything that arrives, in order of arrival, to its end or to a time."""
        waiting = deque(sorted(arrivals, key=lambda arrival: arrival.time))
        while (waiting or self.scheduler.has_work) and self.now < until:
            if not self.scheduler.has_work:
                self.now = max(self.now, waiting[0].time)
            while waiting and waiting[0].time <= self.now:
                self._add(waiting.popleft())
            self._step()
        return list(self._served.values())

    def _add(self, arrival: Arrival) -> None:
        prompt = tuple(itertools.islice(self._tokens, arrival.length))
        request = Request("", prompt, SamplingParams(max_tokens=arrival.answer), arrival.time)
        self.scheduler.add(request)
        self._served[request] = Served(arrival)

    def _step(self) -> None:
        step = self.scheduler.schedule()
        assert step is not None
        self.now += self.seconds(sum(chunk.length for chunk in step.chunks))
        self.ends.append(self.now)
        self.scheduler.commit(step)
        for chunk in step.chunks:
            for seq in chunk.samples:
                self._give(seq)

    def _give(self, seq: Sequence) -> None:
        self.scheduler.append(seq, 0)
        self._served[seq.request].times.append(self.now)
        if len(seq.token_ids) == seq.max_length:
            self.scheduler.finish(seq, "length")


def poisson(rng: random.Random, rate: float, until: float, lengths: tuple[int, int], answer: int) -> Iterator[Arrival]:
    """Prompts that come at random, `rate` a second, of lengths spread evenly between two."""
    time = rng.expovariate(rate)
    while time < until:
        yield Arrival(time, rng.randint(*lengths), answer)
        time += rng.expovariate(rate)


def percentile(values: Iterable[float], percent: float) -> float:
    """The smallest of the values that at least so many percent of them do not exceed."""
    ordered = sorted(values)
    return ordered[math.ceil(len(ordered) * percent / 100) - 1]
