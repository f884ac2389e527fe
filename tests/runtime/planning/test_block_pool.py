"""The pool's pages by hand-computed cases: counts, prefix reuse, eviction order, and misuse."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fastllama.runtime.planning.block_pool import ROOT, BlockPool, Prefix

NOTHING = Prefix([], ROOT)


def filled(pool: BlockPool, token_ids: list[int]) -> list[int]:
    """Pages that hold token_ids after a sequence has computed and published them."""
    prefix = pool.match_prefix(token_ids)
    page_ids = pool.acquire(len(token_ids), prefix)
    assert page_ids is not None
    prefix_id, size = prefix.prefix_id, pool.page_size
    for index in range(len(prefix.page_ids), len(token_ids) // size):
        prefix_id = pool.publish(page_ids[index], prefix_id, tuple(token_ids[index * size : (index + 1) * size]))
    pool.check_invariants()
    return page_ids


def test_the_runtime_schedules_without_torch() -> None:
    script = (
        "import sys, fastllama.runtime.planning.scheduler, fastllama.runtime.outputs\n"
        "sys.exit(any(name.split('.')[0] in ('torch', 'triton', 'numpy') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize(("num_pages", "page_size"), [(0, 16), (-1, 16), (16, 0)])
def test_sizes_are_checked(num_pages: int, page_size: int) -> None:
    with pytest.raises(ValueError, match="legal: at least 1"):
        BlockPool(num_pages, page_size)


@pytest.mark.parametrize(("num_tokens", "pages"), [(0, 0), (1, 1), (3, 1), (4, 1), (5, 2)])
def test_pages_for(num_tokens: int, pages: int) -> None:
    assert BlockPool(8, 4).pages_for(num_tokens) == pages


def test_every_page_is_given_once_and_comes_back() -> None:
    pool = BlockPool(3, 4)
    page_ids = [pool.allocate() for _ in range(3)]
    assert sorted(page_ids) == [0, 1, 2]
    assert pool.num_available == 0
    pool.check_invariants()
    with pytest.raises(AssertionError, match="exhausted"):
        pool.allocate()
    pool.free(page_ids)
    pool.check_invariants()
    assert pool.num_available == 3


def test_a_shared_page_comes_back_with_its_last_holder() -> None:
    pool = BlockPool(1, 4)
    page_ids = [pool.allocate()]
    assert not pool.is_shared(0)
    pool.share(page_ids)
    assert pool.is_shared(0)
    pool.free(page_ids)
    assert not pool.is_shared(0)
    assert pool.num_available == 0
    pool.free(page_ids)
    assert pool.num_available == 1


@pytest.mark.parametrize("page_id", [0, 1, 2, -1])
def test_freeing_what_is_not_held_is_caught(page_id: int) -> None:
    pool = BlockPool(2, 4)
    pool.free([pool.allocate()])
    with pytest.raises(AssertionError, match=rf"page {page_id} is"):
        pool.free([page_id])


def test_a_prefix_is_found_page_by_page() -> None:
    pool = BlockPool(8, 2)
    page_ids = filled(pool, [1, 2, 3, 4, 5])
    assert len(page_ids) == 3
    assert pool.match_prefix([1, 2, 3, 4, 5]).page_ids == page_ids[:2]
    assert pool.match_prefix([1, 2, 3, 9, 5]).page_ids == page_ids[:1]
    assert pool.match_prefix([1, 9, 3, 4, 5]).page_ids == []
    assert pool.match_prefix([3, 4, 5]).page_ids == [], "the same tokens at another place are not the same KV"
    assert pool.match_prefix([1, 2, 1, 2, 5]).page_ids == page_ids[:1]


def test_the_last_token_is_always_left_to_compute() -> None:
    pool = BlockPool(8, 2)
    page_ids = filled(pool, [1, 2, 3, 4])
    assert pool.match_prefix([1, 2, 3, 4]).page_ids == page_ids[:1]
    assert pool.match_prefix([1, 2, 3, 4, 5]).page_ids == page_ids[:2]
    assert pool.match_prefix([1, 2]).page_ids == []
    assert pool.match_prefix([1]).page_ids == []
    assert pool.match_prefix([]).page_ids == []


def test_tokens_with_equal_hashes_are_distinguished() -> None:
    assert hash((-1,)) == hash((-2,)), "CPython: hash(-1) == hash(-2)"
    pool = BlockPool(4, 1)
    filled(pool, [-1, 0])
    assert pool.match_prefix([-2, 0]).page_ids == []
    assert len(pool.match_prefix([-1, 0]).page_ids) == 1


def test_acquire_shares_the_prefix_and_counts() -> None:
    pool = BlockPool(8, 2)
    first = filled(pool, [1, 2, 3, 4, 5])
    second = pool.acquire(6, pool.match_prefix([1, 2, 3, 4, 8, 9]))
    assert second is not None
    assert second[:2] == first[:2]
    assert second[2] not in first
    assert [pool.is_shared(page_id) for page_id in first] == [True, True, False]
    assert pool.num_available == 8 - 4
    assert (pool.num_queried_tokens, pool.num_hit_tokens, pool.num_evictions) == (5 + 6, 4, 0)


def test_acquire_counts_idle_pages_of_the_prefix_as_taken() -> None:
    pool = BlockPool(3, 2)
    pool.free(filled(pool, [1, 2, 3, 4, 5]))  # two idle pages and a free one
    assert pool.num_available == 3
    prefix = pool.match_prefix([1, 2, 3, 4, 5, 6, 7])
    assert len(prefix.page_ids) == 2
    assert pool.acquire(7, prefix) is None, "two cached and two fresh pages are four"
    assert pool.num_available == 3, "a refusal changes nothing"
    assert (pool.num_queried_tokens, pool.num_hit_tokens) == (5, 0)
    pool.check_invariants()
    assert pool.acquire(6, prefix) is not None
    assert pool.num_available == 0
    pool.check_invariants()


def test_a_freed_prefix_is_reusable_until_evicted() -> None:
    pool = BlockPool(4, 2)
    page_ids = filled(pool, [1, 2, 3, 4, 5])
    pool.free(page_ids)
    assert pool.match_prefix([1, 2, 3, 4, 5]).page_ids == page_ids[:2]
    taken = [pool.allocate(), pool.allocate()]
    assert not set(taken) & set(page_ids[:2]), "free pages go first"
    assert pool.num_evictions == 0
    assert pool.allocate() == page_ids[1], "then the end of the chain, without which its start is still of use"
    assert pool.match_prefix([1, 2, 3, 4, 5]).page_ids == page_ids[:1]
    assert pool.allocate() == page_ids[0]
    assert pool.match_prefix([1, 2, 3, 4, 5]).page_ids == []
    assert pool.num_evictions == 2
    pool.check_invariants()


def test_the_least_recently_used_prefix_is_evicted_first() -> None:
    pool = BlockPool(3, 1)
    first, second, third = (filled(pool, [token]) for token in (1, 2, 3))
    for page_ids in (second, first, third):
        pool.free(page_ids)
    again = pool.acquire(2, pool.match_prefix([2, 0]))  # takes up 2, and evicts the oldest then: 1
    assert again == [second[0], first[0]]
    pool.free(again)
    assert pool.match_prefix([1, 0]).page_ids == []
    assert pool.match_prefix([3, 0]).page_ids == third
    assert pool.match_prefix([2, 0]).page_ids == second
    assert [pool.allocate(), pool.allocate(), pool.allocate()] == [first[0], third[0], second[0]]


def test_a_second_page_of_equal_content_stays_out_of_the_cache() -> None:
    pool = BlockPool(4, 2)
    first, second = pool.acquire(3, NOTHING), pool.acquire(3, NOTHING)
    assert first is not None
    assert second is not None
    prefix_id = pool.publish(first[0], ROOT, (1, 2))
    assert pool.publish(second[0], ROOT, (1, 2)) == prefix_id
    assert pool.publish(first[0], ROOT, (1, 2)) == prefix_id, "publishing twice changes nothing"
    assert pool.match_prefix([1, 2, 3]) == Prefix([first[0]], prefix_id)
    assert pool.publish(second[1], prefix_id, (3, 4)) != prefix_id
    assert pool.match_prefix([1, 2, 3, 4, 5]).page_ids == [first[0], second[1]]
    pool.free(second)
    pool.free(first)
    pool.check_invariants()
    assert pool.num_available == 4


def test_a_prefix_computed_again_after_eviction_is_a_new_one() -> None:
    pool = BlockPool(2, 1)
    old = filled(pool, [1, 2])
    old_id = pool.match_prefix([1, 0]).prefix_id
    pool.free(old)
    pool.free([pool.allocate(), pool.allocate()])
    pool.free(filled(pool, [1]))
    new = pool.match_prefix([1, 2, 0])
    assert len(new.page_ids) == 1
    assert new.prefix_id not in (ROOT, old_id), "an id given out again could name other tokens"


def test_misuse_of_publish_is_caught() -> None:
    pool = BlockPool(2, 2)
    page_id = pool.allocate()
    with pytest.raises(AssertionError, match="published with 1 tokens"):
        pool.publish(page_id, ROOT, (1,))
    with pytest.raises(AssertionError, match="has no references"):
        pool.publish(1 - page_id, ROOT, (1, 2))
    pool.publish(page_id, ROOT, (1, 2))
    with pytest.raises(AssertionError, match="two contents"):
        pool.publish(page_id, ROOT, (3, 4))


def test_what_is_evicted_moves_to_the_host_and_comes_back() -> None:
    pool = BlockPool(3, 2, num_host_pages=4)
    pool.free(filled(pool, [1, 2, 3, 4, 5]))  # pages 0 and 1 idle, 2 free
    prefix = pool.match_prefix([1, 2, 3, 4, 5])
    others = pool.acquire(6, NOTHING)
    assert others == [2, 1, 0]
    assert pool.take_transfers() == ((1, 3), (0, 4)), "the end of the chain first, to the first pages of the host"
    assert pool.take_transfers() == (), "once"
    assert pool.match_prefix([1, 2, 3, 4, 5]) == Prefix([4, 3], prefix.prefix_id)
    pool.check_invariants()
    pool.free(others)
    found = pool.acquire(5, pool.match_prefix([1, 2, 3, 4, 5]))
    assert found == [2, 1, 0]
    assert pool.take_transfers() == ((4, 2), (3, 1))
    assert pool.match_prefix([1, 2, 3, 4, 5]) == Prefix([2, 1], prefix.prefix_id), "of the device now"
    assert (pool.num_queried_tokens, pool.num_hit_tokens, pool.num_host_hit_tokens) == (5 + 6 + 5, 4, 4)
    assert pool.num_evictions == 0, "nothing was lost"
    pool.check_invariants()


def test_a_full_host_gives_up_the_least_recently_used() -> None:
    pool = BlockPool(2, 1, num_host_pages=2)
    for token in (1, 2, 3, 4):
        pool.free(filled(pool, [token]))
    pool.free(pool.acquire(2, NOTHING) or [])
    assert pool.num_evictions == 2
    assert pool.take_transfers() == ((0, 2), (1, 3), (0, 2), (1, 3))
    assert [pool.match_prefix([token, 0]).page_ids for token in (1, 2, 3, 4)] == [[], [], [2], [3]]
    pool.check_invariants()


def test_what_is_taken_from_a_full_host_does_not_give_way_to_what_it_displaces() -> None:
    pool = BlockPool(2, 1, num_host_pages=2)
    first = [1, 2, 0]
    pool.free(filled(pool, first[:2]))
    pool.free(filled(pool, [3, 4]))
    prefix = pool.match_prefix(first)
    assert prefix.page_ids == [3, 2]
    pool.take_transfers()
    assert pool.acquire(2, prefix) == [0, 1]
    # What page 0 held is lost, for the host is full; into what comes free there goes what page 1 held.
    assert pool.take_transfers() == ((3, 0), (1, 3), (2, 1))
    assert pool.num_evictions == 1
    assert pool.match_prefix(first).page_ids == [0, 1]
    assert pool.match_prefix([3, 4, 0]).page_ids == [3]
    pool.check_invariants()


def test_acquire_takes_pages_held_idle_and_away() -> None:
    pool = BlockPool(4, 1, num_host_pages=4)
    long = [1, 2, 3, 0]
    pool.free(filled(pool, long[:3]))
    held = pool.acquire(1, pool.match_prefix([1, 0]))
    assert held == [0]
    pool.free([pool.allocate(), pool.allocate()])  # a free one, and that of token 3, which was idle longest
    prefix = pool.match_prefix(long)
    assert prefix.page_ids == [0, 1, 4]
    before = pool.num_available
    assert pool.acquire(5, prefix) is None, "one page held, one idle, one away and two fresh are four that are missing"
    assert (pool.num_available, pool.num_hit_tokens, pool.match_prefix(long)) == (before, 1, prefix)
    pool.check_invariants()
    pool.take_transfers()
    page_ids = pool.acquire(4, prefix)
    assert page_ids is not None
    assert page_ids[:2] == [0, 1]
    assert pool.take_transfers() == ((4, page_ids[2]),)
    assert (pool.num_hit_tokens, pool.num_host_hit_tokens, pool.num_available) == (1 + 3, 1, 0)
    pool.check_invariants()


def test_what_is_computed_again_replaces_its_copy_on_the_host() -> None:
    pool = BlockPool(2, 1, num_host_pages=1)
    pool.free(filled(pool, [1]))
    below = pool.match_prefix([1, 0]).prefix_id
    pool.free([pool.allocate(), pool.allocate()])
    assert pool.match_prefix([1, 0]) == Prefix([2], below)
    page_id = pool.allocate()
    assert pool.publish(page_id, ROOT, (1,)) == below, "the same prefix, so that what follows it is still found"
    assert pool.match_prefix([1, 0]).page_ids == [page_id]
    pool.check_invariants()


def test_what_was_not_copied_is_never_found() -> None:
    pool = BlockPool(3, 1, num_host_pages=3)
    pool.free(filled(pool, [1, 2]))
    pool.free(filled(pool, [5, 6, 7]))
    pool.take_transfers()
    page_ids = pool.acquire(3, pool.match_prefix([1, 2, 0]))
    assert page_ids is not None
    assert pool.match_prefix([1, 2, 0]).page_ids == page_ids[:2]
    assert len(pool.match_prefix([5, 6, 7, 0]).page_ids) == 3
    pool.forget(pool.take_transfers())
    pool.check_invariants()
    assert pool.match_prefix([1, 2, 0]).page_ids == []
    assert pool.match_prefix([5, 6, 7, 0]).page_ids == []
    pool.free(page_ids)
    pool.check_invariants()
    assert pool.num_available == 3


def test_without_its_host_a_pool_goes_on() -> None:
    pool = BlockPool(2, 1, num_host_pages=2)
    for token in (1, 2, 3):
        pool.free(filled(pool, [token]))
    pool.take_transfers()
    pool.drop_host()
    pool.check_invariants()
    assert [pool.match_prefix([token, 0]).page_ids for token in (1, 2, 3)] == [[], [1], [0]]
    pool.free(pool.acquire(2, NOTHING) or [])
    assert pool.take_transfers() == ()
    pool.check_invariants()


def test_forgotten_prefixes_are_matched_no_more() -> None:
    pool = BlockPool(3, 1, num_host_pages=3)
    for token in (1, 3):
        pool.free(filled(pool, [token, token + 1]))
    assert [len(pool.match_prefix([token, token + 1, 0]).page_ids) for token in (1, 3)] == [2, 2]
    assert pool.match_prefix([1, 2, 0]).page_ids[1] >= pool.num_pages, "one on the host"
    pool.forget_prefixes()
    pool.check_invariants()
    assert [pool.match_prefix([token, token + 1, 0]).page_ids for token in (1, 3)] == [[], []]
    assert pool.num_available == 3
    assert pool.num_evictions == 0, "none had to give way"
    assert [pool.allocate(), pool.allocate(), pool.allocate()] == [0, 1, 2]
    assert len(pool.take_transfers()) == 1, "of what was moved before: a forgotten page needs no transfer"


def test_what_is_computed_after_prefixes_are_forgotten_is_cached_anew() -> None:
    pool = BlockPool(4, 2, num_host_pages=1)
    pool.free(filled(pool, [1, 2, 3, 4, 5]))
    old = pool.match_prefix([1, 2, 3, 4, 5]).prefix_id
    pool.forget_prefixes()
    assert pool.match_prefix([1, 2]).prefix_id > old, "not even the root's id is given out again"
    page_ids = filled(pool, [1, 2, 3, 4, 5])
    new = pool.match_prefix([1, 2, 3, 4, 5])
    assert new.page_ids == page_ids[:2]
    assert new.prefix_id > old


@pytest.mark.parametrize("published", [0, 1, 2])
def test_a_page_held_while_prefixes_are_forgotten_never_offers_its_content(published: int) -> None:
    """Neither pages published before, nor one that was half full then, nor pages computed from them are offered."""
    pool, token_ids = BlockPool(8, 2), [1, 2, 3, 4, 5, 6]
    page_ids = pool.acquire(6, pool.match_prefix(token_ids))
    assert page_ids is not None
    prefix_id = ROOT
    for index in range(3):
        if index == published:
            pool.forget_prefixes()
            pool.check_invariants()
        prefix_id = pool.publish(page_ids[index], prefix_id, tuple(token_ids[2 * index : 2 * index + 2]))
        pool.check_invariants()
    assert pool.num_available == 5, "they are still held"
    assert pool.match_prefix([*token_ids, 7]).page_ids == []
    others = filled(pool, token_ids)
    assert not set(others) & set(page_ids)
    pool.free(page_ids)
    pool.check_invariants()
    assert pool.match_prefix([*token_ids, 7]).page_ids == others, "the content that was computed since"


def test_pages_on_their_way_to_a_holder_still_arrive_when_prefixes_are_forgotten() -> None:
    pool = BlockPool(2, 1, num_host_pages=2)
    for token in (1, 3):
        pool.free(filled(pool, [token, token + 1]))
    pool.take_transfers()
    page_ids = pool.acquire(2, pool.match_prefix([1, 2, 0]))
    assert page_ids is not None
    pool.forget_prefixes()
    pool.check_invariants()
    arrivals = {place: source for source, place in pool.take_transfers() if place < pool.num_pages}
    assert arrivals == {page_ids[0]: 3, page_ids[1]: 2}


def test_prefixes_are_forgotten_without_a_host_too() -> None:
    pool = BlockPool(2, 1, num_host_pages=2)
    pool.free(filled(pool, [1]))
    pool.drop_host()
    pool.forget_prefixes()
    pool.check_invariants()
    assert pool.match_prefix([1, 0]).page_ids == []
