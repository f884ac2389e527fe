"""Long prompts do not hold up short ones, and short ones delay a long one by half its length at most."""

from __future__ import annotations

import itertools
import random

import pytest

from fastllama.runtime.planning.scheduler import Scheduler
from fastllama.runtime.planning.sequence import Request, Status
from tests.runtime.planning.simulation import Server, percentile, poisson
from tests.runtime.planning.test_scheduler import add, first, make, spans, turn

LONG, SHORT, BUDGET = 1000, 20, 100


def test_a_waiting_prompt_lets_half_as_many_tokens_pass_as_it_has() -> None:
    scheduler = make(seqs=1, budget=10)
    add(scheduler, [99], max_tokens=1)
    turn(scheduler)
    for start, length in ((0, 10), (10, 6), (20, 3), (30, 2), (40, 1), (50, 1)):
        add(scheduler, range(start, start + length), max_tokens=1)
    # 6 may not pass 10. 3 and 2 pass both, and 10 lets none pass any more. A 1 passes 6 alone, and so does the other.
    order = []
    scheduler.finish(scheduler._running[0], "length")
    while scheduler.has_work:
        (chunk,) = turn(scheduler).chunks
        order.append((chunk.seq.token_ids[0], chunk.length))
        scheduler.finish(chunk.seq, "length")
    assert order == [(20, 3), (30, 2), (0, 10), (40, 1), (50, 1), (10, 6)]


def test_no_request_passes_a_prompt_that_has_begun() -> None:
    scheduler = make(6, 2, seqs=3, budget=5)
    add(scheduler, range(4), max_tokens=5)
    preempted = first(add(scheduler, range(10, 18), max_tokens=3))
    for _ in range(2):
        turn(scheduler)
    assert preempted.status is Status.WAITING
    add(scheduler, [99], max_tokens=1)
    assert next(iter(scheduler._waiting)) is preempted


def test_a_short_prompt_is_admitted_beside_a_long_one_under_way() -> None:
    scheduler = make(seqs=8, budget=8)
    add(scheduler, range(30))
    turn(scheduler)
    for start, length in ((40, 2), (50, 2), (60, 1), (70, 5)):
        add(scheduler, range(start, start + length))
    assert spans(turn(scheduler)) == [(3, 0, 1), (1, 0, 2), (0, 8, 5)], "a second one of 2 would pass the half of 8"


def step(scheduler: Scheduler) -> None:
    """One step; each request ends with its second token."""
    for chunk in turn(scheduler).chunks:
        for seq in chunk.samples:
            if len(seq.token_ids) == seq.max_length:
                scheduler.finish(seq, "length")


def steps_until_its_first_token(scheduler: Scheduler, request: Request) -> int:
    seq = first(request)
    for count in range(1000):
        if len(seq.token_ids) > seq.num_prompt_tokens:
            return count
        step(scheduler)
    raise AssertionError("starved")


class Prompts:
    """Prompts that share no page."""

    def __init__(self, num_pages: int) -> None:
        self.scheduler = make(num_pages, 10, budget=BUDGET, seqs=8, length=LONG + 2)
        self._tokens = itertools.count()

    def add(self, length: int) -> Request:
        return add(self.scheduler, itertools.islice(self._tokens, length), max_tokens=2)


@pytest.mark.parametrize("num_pages", [160, 3000])  # for one long prompt and a half, or for all of them
@pytest.mark.parametrize("num_steps", [0, 1, 13])
def test_a_short_prompt_is_answered_at_once_in_a_flood_of_long_ones(num_pages: int, num_steps: int) -> None:
    prompts = Prompts(num_pages)
    for _ in range(20):
        prompts.add(LONG)
    for _ in range(num_steps):
        step(prompts.scheduler)
    waits = [steps_until_its_first_token(prompts.scheduler, prompts.add(SHORT)) for _ in range(100)]
    assert max(waits) <= 2
    assert prompts.scheduler.num_waiting > 5, "no long prompt waits any more"


@pytest.mark.parametrize("seed", range(3))
def test_the_first_token_of_a_short_prompt_takes_two_steps_in_a_flood_of_long_ones(seed: int) -> None:
    """The step that runs when it comes, and its own; by the clock, at random times, while there are pages."""
    rng, server = random.Random(seed), Server(2048)
    full = server.seconds(2048)
    flood = list(poisson(rng, 1.5 / server.seconds(10_000), 60.0, (4_000, 16_000), 20))
    short = list(poisson(rng, 2.0, 60.0, (10, 200), 5))
    served = server.serve([*flood, *short], until=62.0)
    waits = {
        long: [one.first_token_seconds for one in served if (one.arrival in flood) == long and one.times]
        for long in (False, True)
    }
    assert len(waits[False]) == len(short) > 90
    assert server.scheduler.num_waiting > 10, "no long prompt waits any more"
    assert percentile(waits[False], 99) <= 2 * full < 10 * full < percentile(waits[True], 50)
    assert max(waits[False]) <= 3 * full


def test_many_short_prompts_wait_for_a_share_of_the_steps_alone() -> None:
    prompts = Prompts(3000)
    for _ in range(20):
        prompts.add(LONG)
    step(prompts.scheduler)
    shorts = [prompts.add(SHORT) for _ in range(50)]
    waits = [steps_until_its_first_token(prompts.scheduler, request) for request in shorts]
    # Half of each step is theirs; that they are twice as many as one long prompt lets pass puts one before the last.
    assert sum(waits) <= 50 * SHORT / (BUDGET / 2) + LONG / BUDGET + 2


def test_a_long_prompt_is_not_starved_by_short_ones() -> None:
    prompts = Prompts(3000)
    ahead = [prompts.add(LONG // 2) for _ in range(5)]
    long = prompts.add(LONG)
    # One and a half of all tokens up to its own pass; then half a step may go to others while these are under way.
    tokens = 5 * (LONG // 2) + LONG
    for _ in range(int((1.5 * tokens + tokens) / BUDGET) + 10):
        for _ in range(BUDGET // SHORT):  # a step's worth of short ones, in each step: their queue only grows
            prompts.add(SHORT)
        step(prompts.scheduler)
    assert all(request.finished for request in (*ahead, long))
