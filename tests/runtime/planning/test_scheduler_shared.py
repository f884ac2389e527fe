"""Requests that share a prefix with a running sequence wait for it to be computed, and share its pages."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Sequence

import pytest

from fastllama.runtime.planning.block_pool import ROOT, BlockPool, Prefix
from fastllama.runtime.planning.scheduler import MOST_PASSED
from fastllama.runtime.planning.sequence import Status
from tests.runtime.planning.test_block_pool import filled
from tests.runtime.planning.test_scheduler import add, first, make, spans, turn


def test_a_prefix_that_another_computes_is_waited_for() -> None:
    scheduler = make(20, 2, budget=8)
    requests = [add(scheduler, prompt) for prompt in ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 6], [9] * 6)]
    assert spans(turn(scheduler)) == [(0, 0, 6), (2, 0, 2)], "the second would compute what the first does"
    assert spans(turn(scheduler)) == [(0, 6, 1), (1, 4, 2), (2, 2, 4)], "only what it does not share"
    assert [request.num_cached_tokens for request in requests] == [0, 4, 0]
    assert first(requests[1]).page_ids[:2] == first(requests[0]).page_ids[:2]


def test_a_prefix_is_waited_for_page_by_page() -> None:
    """A long prompt is computed in chunks: the others wait for as much as they share."""
    scheduler = make(20, 2, budget=8)
    add(scheduler, range(20))
    other = add(scheduler, [*range(9), *range(50, 61)])
    assert [spans(turn(scheduler)) for _ in range(4)] == [
        [(0, 0, 8)],
        [(0, 8, 8)],
        [(0, 16, 4), (1, 8, 4)],
        [(0, 20, 1), (1, 12, 7)],
    ]
    assert other.num_cached_tokens == 8


@pytest.mark.parametrize("ends", ["abort", "rollback"])
def test_nothing_is_waited_for_that_will_not_come(ends: str) -> None:
    scheduler = make(20, 2, budget=4, seqs=4)
    one, other = (add(scheduler, range(8)) for _ in range(2))
    turn(scheduler)
    assert first(other).status is Status.WAITING
    if ends == "abort":
        scheduler.abort(one)
    else:
        scheduler.rollback()
        scheduler.abort(one)
    assert spans(turn(scheduler)) == [(1, 4, 4)], "what was computed is in the cache, the rest it computes itself"


def test_one_that_waits_is_looked_up_twice() -> None:
    """When it is found to wait, and when the pages that it shares are there: not for each of them."""
    scheduler = make(1000, 2, budget=8, length=1000)
    add(scheduler, range(400))
    others = [add(scheduler, [*range(300), *range(900, 1000)]) for _ in range(3)]
    counts = Counter[tuple[int, ...]]()
    match = scheduler.pool.match_prefix

    def counting(token_ids: Sequence[int]) -> Prefix:
        counts[tuple(token_ids)] += 1
        return match(token_ids)

    scheduler.pool.match_prefix = counting  # type: ignore[method-assign]
    while first(others[0]).status is Status.WAITING:
        turn(scheduler)
    assert [request.num_cached_tokens for request in others] == [300, None, None]
    assert counts[others[0].prompt_token_ids] <= 3 * 2 + 2, "and the others, that wait for its last pages"


def test_nothing_of_one_that_lacked_room_is_kept() -> None:
    scheduler = make(4, 2)
    one, other = add(scheduler, [7] * 5, max_tokens=1), add(scheduler, [8] * 6, max_tokens=1)
    turn(scheduler)
    assert first(other).status is Status.WAITING
    seq = first(other)
    scheduler.abort(other)
    found = gc.get_referrers(seq)
    assert [each for each in found if isinstance(each, (dict, tuple)) and each is not other] == []
    scheduler.abort(one)


def test_a_page_that_two_hold_is_published_once_whatever_its_prefix_is_called() -> None:
    """The second holder knows the prefix by a newer id, for the page that the first was cached in was given up."""
    pool = BlockPool(4, 1)
    pages = [pool.allocate() for _ in range(2)]
    pool.share(pages)
    (other,) = filled(pool, [1])
    prefix_id = pool.publish(pages[0], ROOT, (1,))
    known = pool.publish(pages[1], prefix_id, (2,))
    pool.free([other])
    for _ in range(2):
        pool.allocate()  # the second takes the page that the prefix was cached in
    again = pool.publish(pages[0], ROOT, (1,))
    assert again != prefix_id
    assert pool.publish(pages[1], again, (2,)) == known
    pool.check_invariants()


def test_the_queue_goes_on_after_those_that_wait() -> None:
    """The scheduler looks at so many in one step; beyond them the queue waits."""
    scheduler = make(10_000, 2, budget=1000, seqs=200, length=1000)
    add(scheduler, range(900))
    waiting = [add(scheduler, range(900)) for _ in range(MOST_PASSED - 1)]
    other = add(scheduler, [7] * 900)
    assert spans(turn(scheduler)) == [(0, 0, 900), (MOST_PASSED, 0, 100)]
    assert other.num_cached_tokens == 0
    assert {first(each).status for each in waiting} == {Status.WAITING}
    scheduler = make(10_000, 2, budget=1000, seqs=200, length=1000)
    for _ in range(MOST_PASSED + 1):
        add(scheduler, range(900))
    add(scheduler, [7] * 900)
    assert spans(turn(scheduler)) == [(0, 0, 900)]
