"""A waiting request at the head of the queue is looked up in the prefix cache again only when that could help."""

from __future__ import annotations

import random
from collections import Counter, abc

import pytest

from fastllama.runtime.planning.block_pool import BlockPool, Prefix
from fastllama.runtime.planning.lookups import Lookups
from fastllama.runtime.planning.scheduler import Scheduler
from fastllama.runtime.planning.sequence import Sequence, Status
from tests.runtime.planning.test_scheduler import add, first, spans, turn


class CountingPool(BlockPool):
    """Counts how often a prompt is looked up."""

    num_lookups = 0

    def match_prefix(self, token_ids: abc.Sequence[int]) -> Prefix:
        self.num_lookups += 1
        return super().match_prefix(token_ids)


class Forgetful(Scheduler):
    """Looks those that wait up in each step."""

    def __init__(self, pool: BlockPool, **sizes: int) -> None:
        super().__init__(pool, **sizes)
        self._lookups = ForgetfulLookups(pool)


class ForgetfulLookups(Lookups):
    """Remembers nothing of the last step."""

    looks = False

    def find(self, seq: Sequence) -> Prefix | None:
        self.looks = True
        found = super().find(seq)
        self.looks = False
        return found

    def waits(self, seq: Sequence) -> bool:
        return self.looks and super().waits(seq)

    def lacks_room(self, *given: object) -> bool:
        return False


def make(num_pages: int, page_size: int, kind: type[Scheduler] = Scheduler, **sizes: int) -> Scheduler:
    limits = {"max_num_batched_tokens": 1000, "max_num_seqs": 8, "max_model_len": 10**4} | sizes
    return kind(CountingPool(num_pages, page_size), **limits)


def lookups(scheduler: Scheduler) -> int:
    assert isinstance(scheduler.pool, CountingPool)
    return scheduler.pool.num_lookups


@pytest.mark.parametrize("budget", [1000, 41])  # 41: the second prompt is under way for as long
@pytest.mark.parametrize("shared", [0, 400])  # tokens of the head that are in the cache, and held
def test_a_head_that_finds_no_pages_costs_no_lookups(shared: int, budget: int) -> None:
    scheduler = make(110, 10, max_num_batched_tokens=budget)
    running = first(add(scheduler, range(410), max_tokens=99))
    while running.num_computed < 410:
        turn(scheduler)
    other = add(scheduler, range(1000, 1500))
    turn(scheduler)
    head = first(add(scheduler, [*range(shared), *range(2000, 2600)], max_tokens=1))
    before = lookups(scheduler)
    for _ in range(8):
        turn(scheduler)
    # The head lacks 41 pages and more, and in eight steps the others publish 33 at most.
    assert lookups(scheduler) == before + 1
    for request in (running.request, other):
        assert head.status is Status.WAITING
        scheduler.abort(request)
    turn(scheduler)
    assert head.status is Status.RUNNING


def test_a_head_that_finds_no_seat_costs_no_lookups() -> None:
    scheduler = make(100, 10, max_num_seqs=1)
    add(scheduler, range(20))
    add(scheduler, range(100, 120))
    for _ in range(5):
        turn(scheduler)
    assert lookups(scheduler) == 1


def test_a_page_published_since_lets_the_head_in() -> None:
    """Tokens that another generates are in the head's prompt: with a page of them, few enough are left for the step."""
    scheduler = make(200, 10, max_num_batched_tokens=40)
    other = first(add(scheduler, [7] * 4))
    turn(scheduler)
    add(scheduler, range(1000, 1900))
    turn(scheduler)
    head = first(add(scheduler, [7] * 25))
    for _ in range(5):
        turn(scheduler)
        assert head.status is Status.WAITING, "a long prompt is under way, and half a step is less than 25 tokens"
    assert other.num_computed == 10
    turn(scheduler)
    assert head.request.num_cached_tokens == 10


def test_what_is_remembered_changes_no_step() -> None:
    """Two schedulers under the same storm, one of which looks up in every step."""
    counts: Counter[str] = Counter()
    for seed in range(100):
        rng = random.Random(seed)
        size, limit = rng.choice([1, 2, 4]), rng.choice([16, 40])
        sizes = {"max_num_batched_tokens": rng.randint(4, 24), "max_num_seqs": 4, "max_model_len": limit}
        num_pages = limit // size + rng.randint(0, 8)
        pair = [make(num_pages, size, kind, **sizes) for kind in (Scheduler, Forgetful)]
        rng_state = rng.getstate()
        histories = []
        for scheduler in pair:
            rng.setstate(rng_state)
            histories.append(storm(scheduler, rng, limit))
        assert histories[0] == histories[1]
        counts["preemptions"] += pair[0].num_preemptions
        counts["tokens reused"] += pair[0].pool.num_hit_tokens
        counts["evictions"] += pair[0].pool.num_evictions
        counts["lookups spared"] += lookups(pair[1]) - lookups(pair[0])
    assert len(counts) == 4
    assert min(counts.values()) > 1000, "too few events"


def storm(scheduler: Scheduler, rng: random.Random, limit: int) -> list[list[tuple[int, int, int]]]:
    """The spans of 150 steps of random requests with common prefixes; some end early."""
    found, requests = [], []
    for _ in range(150):
        if rng.random() < 0.5:
            prompt = [rng.randrange(2) if rng.random() < 0.1 else 0 for _ in range(rng.randint(1, limit - 2))]
            requests.append(add(scheduler, prompt, max_tokens=rng.randint(1, 12), n=rng.choice([1, 1, 2])))
        if requests and rng.random() < 0.1:
            scheduler.abort(rng.choice(requests))
        if not scheduler.has_work:
            continue
        step = scheduler.schedule()
        assert step is not None
        found.append(spans(step))
        if rng.random() < 0.02:
            scheduler.rollback()
            continue
        scheduler.commit(step)
        for chunk in step.chunks:
            for seq in chunk.samples:
                scheduler.append(seq, rng.randrange(2))
                if len(seq.token_ids) == seq.max_length:
                    scheduler.finish(seq, "length")
    return found
