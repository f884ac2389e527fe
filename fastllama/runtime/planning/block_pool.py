"""The block pool of the paged KV cache: page reference counts, allocation, and the prefix cache."""

from __future__ import annotations

import itertools
from collections import OrderedDict, abc
from typing import NamedTuple

from fastllama.errors import check_range

ROOT = 0  # the prefix id of the empty prefix, until forget_prefixes


class Prefix(NamedTuple):
    """A cached prefix: its pages in order, and the id under which the next page is published.

    Page ids from num_pages on are pages of the host cache.
    """

    page_ids: list[int]
    prefix_id: int


class Transfer(NamedTuple):
    """A pending page copy; either source or destination is a page of the host cache."""

    source: int
    destination: int


class BlockPool:
    """Page ids 0 .. num_pages - 1, each in one of three states.

    held: referenced by one or more sequences (counted).
    idle: unreferenced, but its content is a cached prefix that can be reused.
    free: unreferenced, without content. Allocation takes free pages first, then evicts the least recently used idle
    page.

    With a host cache, an evicted page's content moves to one of num_host_pages further pages, whose ids follow;
    sequences never hold those: they are idle or free. A matched prefix is copied back into pages acquired for it. The
    pool only records these transfers: the engine takes them and copies the pages in that order, before anything else of
    a step, or calls `forget`.

    A cached page's key is (prefix id of the pages before it, its own token ids), compared by equality. A prefix id
    names one sequence of tokens and is never reused, so by induction equal keys mean equal tokens from the start: no
    hash is trusted. Every method costs O(1) per page, a match or publication O(page_size). Ids below `root` belong to
    prefixes dropped by `forget_prefixes`.
    """

    def __init__(self, num_pages: int, page_size: int, num_host_pages: int = 0) -> None:
        check_range("num_pages", num_pages, 1)
        check_range("page_size", page_size, 1)
        check_range("num_host_pages", num_host_pages, 0)
        self.num_pages = num_pages
        self.num_host_pages = num_host_pages
        self.page_size = page_size
        self.root = ROOT  # the prefix id of the empty prefix, under the current weights
        self.num_queried_tokens = 0  # tokens of all sequences that acquired pages
        self.num_hit_tokens = 0  # those found in the cache
        self.num_host_hit_tokens = 0  # those copied back from the host
        self.num_evictions = 0  # idle pages whose content was dropped, from the host where there is a host cache
        self.num_publications = 0  # pages whose content was new to the cache on the device
        self._references = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # a stack, so that low ids are used first
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._cached: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}  # key -> page, its prefix id
        num_places = num_pages + num_host_pages
        self._keys: list[tuple[int, tuple[int, ...]] | None] = [None] * num_places  # the inverse: page -> key
        self._host_free = list(range(num_places - 1, num_pages - 1, -1))
        self._host_idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._transfers: list[Transfer] = []  # not yet taken
        self._prefix_ids = itertools.count(ROOT + 1)

    @property
    def num_available(self) -> int:
        """Pages that can be allocated: free and idle ones."""
        return len(self._free) + len(self._idle)

    def pages_for(self, num_tokens: int) -> int:
        """Number of pages for num_tokens; the last one may be partly filled."""
        return -(-num_tokens // self.page_size)

    def is_shared(self, page_id: int) -> bool:
        """Whether several sequences hold the page, so that none of them may write to it."""
        return self._references[page_id] > 1

    def match_prefix(self, token_ids: abc.Sequence[int]) -> Prefix:
        """Finds the longest cached prefix, without the last token: its logits must be computed. Acquires nothing."""
        size = self.page_size
        page_ids: list[int] = []
        prefix_id = self.root
        for end in range(size, len(token_ids), size):
            found = self._cached.get((prefix_id, tuple(token_ids[end - size : end])))
            if found is None:
                break
            page_id, prefix_id = found
            page_ids.append(page_id)
        return Prefix(page_ids, prefix_id)

    def is_cached(self, prefix_id: int, token_ids: tuple[int, ...]) -> bool:
        """Whether the cache has a page of these tokens after that prefix."""
        return (prefix_id, token_ids) in self._cached

    def cost(self, num_tokens: int, prefix: Prefix) -> int:
        """Available pages that `acquire` would take: all for num_tokens except those that a sequence holds."""
        present = (page_id for page_id in prefix.page_ids if page_id < self.num_pages)
        return self.pages_for(num_tokens) - sum(self._references[page_id] > 0 for page_id in present)

    def acquire(self, num_tokens: int, prefix: Prefix) -> list[int] | None:
        """Acquires pages for num_tokens, the matched prefix first. Returns None, and no page, if too few are left."""
        if self.cost(num_tokens, prefix) > self.num_available:
            return None
        cached = prefix.page_ids
        present = [page_id for page_id in cached if page_id < self.num_pages]
        away = [page_id for page_id in cached if page_id >= self.num_pages]
        fresh = self.pages_for(num_tokens) - len(cached)
        self.num_queried_tokens += num_tokens
        self.num_hit_tokens += len(cached) * self.page_size
        self.num_host_hit_tokens += len(away) * self.page_size
        self.share(present)
        for host_id in away:  # before any allocation, which could evict them
            del self._host_idle[host_id]
        page_ids = [self._bring_back(page_id) if page_id >= self.num_pages else page_id for page_id in cached]
        return page_ids + [self.allocate() for _ in range(fresh)]

    def allocate(self) -> int:
        """Allocates one page with undefined content and one reference. The caller has checked that one is available."""
        assert self.num_available, "allocate() from an exhausted pool"
        if self._free:
            page_id = self._free.pop()
        else:
            page_id, _ = self._idle.popitem(last=False)
            self._move_out(page_id)
        self._references[page_id] = 1
        return page_id

    def share(self, page_ids: abc.Sequence[int]) -> None:
        """Add a reference to pages that another sequence holds, or that are idle."""
        for page_id in page_ids:
            if self._references[page_id] == 0:
                del self._idle[page_id]
            self._references[page_id] += 1

    def free(self, page_ids: abc.Sequence[int]) -> None:
        """Release a sequence's pages, given in order. Pages without references become idle if cached, else free."""
        # The last page first, so that it is evicted first: a page is useless once the pages before it are evicted.
        for page_id in reversed(page_ids):
            assert 0 <= page_id < self.num_pages, f"page {page_id} is not in this pool"
            assert self._references[page_id] > 0, f"page {page_id} is freed but has no references"
            self._references[page_id] -= 1
            if self._references[page_id] == 0:
                if self._keys[page_id] is None:
                    self._free.append(page_id)
                else:
                    self._idle[page_id] = None

    def publish(self, page_id: int, prefix_id: int, token_ids: tuple[int, ...]) -> int:
        """Publishes a held page, written with token_ids after the prefix. Returns the prefix id that includes it.

        If a page of the same content is cached on the device, that one stays, and this one becomes free when it is
        released. A copy on the host is replaced. A page after a forgotten prefix is not cached. A page that another
        holder has published keeps its key, even if the prefix has got another id since.
        """
        assert len(token_ids) == self.page_size, f"a page of {self.page_size} is published with {len(token_ids)} tokens"
        assert self._references[page_id] > 0, f"page {page_id} is published but has no references"
        if prefix_id < self.root:
            return prefix_id
        key = (prefix_id, token_ids)
        if (known := self._keys[page_id]) is not None:
            assert known[1] == token_ids, f"page {page_id} is published with two contents"
            return self._cached[known][1]
        found = self._cached.get(key)
        if found is None:
            found = self._cached[key] = (page_id, next(self._prefix_ids))
            self._keys[page_id] = key
            self.num_publications += 1
        elif found[0] >= self.num_pages:
            del self._host_idle[found[0]]
            self._rename(found[0], page_id)
            self._host_free.append(found[0])
            self.num_publications += 1
        return found[1]

    def take_transfers(self) -> tuple[Transfer, ...]:
        """Returns and clears the pending page copies, to be run in order, before pages allocated since are used."""
        transfers, self._transfers = tuple(self._transfers), []
        return transfers

    def forget(self, transfers: abc.Sequence[Transfer]) -> None:
        """Drop the cache entries of these transfers' destinations: their copies may not have run."""
        for _, place in transfers:
            if self._keys[place] is None:
                continue
            self._give_up(place)
            if place >= self.num_pages:
                del self._host_idle[place]
                self._host_free.append(place)
            else:
                assert self._references[place] > 0, f"page {place} was copied back but has no references"

    def forget_prefixes(self) -> None:
        """Drop every prefix that is cached now, on the device and the host; call it when the weights change.

        Pages that sequences hold stay theirs, as do pending transfers into them. What such a sequence computes from
        then on depends on old pages, so it is not cached until the sequence has been preempted.
        """
        self.root = next(self._prefix_ids)
        self._cached.clear()
        self._keys = [None] * len(self._keys)
        self._free = sorted([*self._free, *self._idle], reverse=True)
        self._host_free = sorted([*self._host_free, *self._host_idle], reverse=True)
        self._idle.clear()
        self._host_idle.clear()

    def drop_host(self) -> None:
        """Drop the content of the host cache, and use none from now on."""
        for place in self._host_idle:
            self._give_up(place)
        self._host_free.clear()
        self._host_idle.clear()
        self.num_host_pages = 0

    def _move_out(self, page_id: int) -> None:
        """Move an evicted page's content to the host cache, which may evict its oldest page; drop it without one."""
        if self._host_free:
            host_id = self._host_free.pop()
        elif self._host_idle:
            host_id, _ = self._host_idle.popitem(last=False)
            self._give_up(host_id)
        else:
            self._give_up(page_id)
            return
        self._rename(page_id, host_id)
        self._host_idle[host_id] = None
        self._transfers.append(Transfer(page_id, host_id))

    def _bring_back(self, host_id: int) -> int:
        """Allocates a page for the content of a host page, which becomes free."""
        page_id = self.allocate()
        self._rename(host_id, page_id)
        self._host_free.append(host_id)
        self._transfers.append(Transfer(host_id, page_id))
        return page_id

    def _rename(self, source: int, destination: int) -> None:
        """Point the cache entry of one page to another."""
        key = self._keys[source]
        assert key is not None, f"page {source} has no cached content to move"
        assert self._keys[destination] is None, f"page {destination} would hold two contents"
        self._keys[source], self._keys[destination] = None, key
        self._cached[key] = (destination, self._cached[key][1])

    def _give_up(self, place: int) -> None:
        """Remove the cache entry of a page."""
        key = self._keys[place]
        assert key is not None, f"page {place} has no cached content"
        del self._cached[key]
        self._keys[place] = None
        self.num_evictions += 1

    def check_invariants(self) -> None:
        """Assert that every page is in exactly one state and the cache is consistent. For tests: O(num_pages)."""
        held = [page_id for page_id, count in enumerate(self._references) if count > 0]
        assert sorted([*held, *self._free, *self._idle]) == list(range(self.num_pages)), (
            "a page is missing or duplicated"
        )
        places = range(self.num_pages, self.num_pages + self.num_host_pages)
        assert sorted([*self._host_free, *self._host_idle]) == list(places), "a host page is missing or duplicated"
        assert all(prefix_id >= self.root for prefix_id, _ in self._cached), "a page of a forgotten prefix is cached"
        keyed = {page_id: key for page_id, key in enumerate(self._keys) if key is not None}
        assert {page_id: key for key, (page_id, _) in self._cached.items()} == keyed, "the cache and its inverse differ"
        assert len(keyed) == len(self._cached), "one page has two cache entries"
        assert all(page_id in keyed for page_id in (*self._idle, *self._host_idle)), "an idle page without content"
        assert not any(page_id in keyed for page_id in (*self._free, *self._host_free)), "a free page with content"
