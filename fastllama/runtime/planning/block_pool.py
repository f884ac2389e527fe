"""The pages of the KV cache: who owns them, and which full pages can be reused because they hold a known prefix."""

from __future__ import annotations

import itertools
from collections import OrderedDict, abc
from typing import NamedTuple

from fastllama.errors import check_range

ROOT = 0  # the prefix id of no tokens, until prefixes are forgotten


class Prefix(NamedTuple):
    """A cached prefix: its pages in order, and the id under which the page that follows it is published.

    Ids from num_pages on are pages of the host cache.
    """

    page_ids: list[int]
    prefix_id: int


class Transfer(NamedTuple):
    """A page's content on its way from the source to the destination, one of which is a page of the host cache."""

    source: int
    destination: int


class BlockPool:
    """Page ids 0 .. num_pages - 1, each in one of three states.

    held: by one or more sequences, counted.
    idle: by none, but its content is a cached prefix that can be taken up again.
    free: by none, its content worthless. Allocation takes free pages first, then the least recently used idle one.

    Where there is a host cache, an idle page that is allocated leaves its content to one of num_host_pages more, whose
    ids follow and which nobody holds: they are idle or free. A matched prefix comes back from there into pages that are
    acquired for it. The pool only notes these transfers: whoever runs the steps takes them and copies the pages in that
    order, before anything else of a step, or says `forget`.

    A cached page's key is (prefix id of the pages before it, its own token ids), compared by equality. A prefix id
    names one sequence of tokens and is never given out again, so by induction equal keys mean equal tokens from the
    start: no hash is trusted. Every method costs O(1) per page, a match or publication O(page_size). Ids below `root`
    are of prefixes that `forget_prefixes` forgot.
    """

    def __init__(self, num_pages: int, page_size: int, num_host_pages: int = 0) -> None:
        check_range("num_pages", num_pages, 1)
        check_range("page_size", page_size, 1)
        check_range("num_host_pages", num_host_pages, 0)
        self.num_pages = num_pages
        self.num_host_pages = num_host_pages
        self.page_size = page_size
        self.root = ROOT  # the prefix id of no tokens, under the present weights
        self.num_queried_tokens = 0  # tokens of all sequences given pages
        self.num_hit_tokens = 0  # those of them found in the cache
        self.num_host_hit_tokens = 0  # those of them that came back from the host
        self.num_evictions = 0  # idle pages whose content was given up, on the host where there is one
        self.num_publications = 0  # pages whose content was new to the cache, or to its part on the device
        self._references = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # a stack, so that low ids are used first
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._cached: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}  # key -> page, prefix id including it
        num_places = num_pages + num_host_pages
        self._keys: list[tuple[int, tuple[int, ...]] | None] = [None] * num_places  # the inverse: page -> key
        self._host_free = list(range(num_places - 1, num_pages - 1, -1))
        self._host_idle: OrderedDict[int, None] = OrderedDict()  # the first to be given up first
        self._transfers: list[Transfer] = []  # not yet taken
        self._prefix_ids = itertools.count(ROOT + 1)

    @property
    def num_available(self) -> int:
        """Pages that can be allocated: free and idle ones."""
        return len(self._free) + len(self._idle)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that num_tokens fill, the last one perhaps in part."""
        return -(-num_tokens // self.page_size)

    def is_shared(self, page_id: int) -> bool:
        """Whether more than one sequence holds the page, so that none of them may write to it."""
        return self._references[page_id] > 1

    def match_prefix(self, token_ids: abc.Sequence[int]) -> Prefix:
        """The longest cached prefix, not yet taken. The last token is never part of it: its logits must be computed."""
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
        """Whether a page of these tokens behind that prefix can be reused."""
        return (prefix_id, token_ids) in self._cached

    def cost(self, num_tokens: int, prefix: Prefix) -> int:
        """How many of the available pages `acquire` takes: all that num_tokens fill but those that someone holds."""
        present = (page_id for page_id in prefix.page_ids if page_id < self.num_pages)
        return self.pages_for(num_tokens) - sum(self._references[page_id] > 0 for page_id in present)

    def acquire(self, num_tokens: int, prefix: Prefix) -> list[int] | None:
        """Pages for num_tokens, first those of a matched prefix. None, and nothing changed, if there are too few."""
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
        for host_id in away:  # before any page is allocated, which could give them up
            del self._host_idle[host_id]
        page_ids = [self._bring_back(page_id) if page_id >= self.num_pages else page_id for page_id in cached]
        return page_ids + [self.allocate() for _ in range(fresh)]

    def allocate(self) -> int:
        """One page, its content undefined, held once. The caller has seen that one is available."""
        assert self.num_available, "allocate() from an exhausted pool"
        if self._free:
            page_id = self._free.pop()
        else:
            page_id, _ = self._idle.popitem(last=False)
            self._move_out(page_id)
        self._references[page_id] = 1
        return page_id

    def share(self, page_ids: abc.Sequence[int]) -> None:
        """Hold pages once more: those of another sequence, or idle ones."""
        for page_id in page_ids:
            if self._references[page_id] == 0:
                del self._idle[page_id]
            self._references[page_id] += 1

    def free(self, page_ids: abc.Sequence[int]) -> None:
        """Let go of a sequence's pages, in its order. Those that nobody else holds become idle if cached, else free."""
        # Last page first, so that it is evicted first: a page is of no use once the ones before it are gone.
        for page_id in reversed(page_ids):
            assert 0 <= page_id < self.num_pages, f"page {page_id} is not of this pool"
            assert self._references[page_id] > 0, f"page {page_id} is freed but held by nobody"
            self._references[page_id] -= 1
            if self._references[page_id] == 0:
                if self._keys[page_id] is None:
                    self._free.append(page_id)
                else:
                    self._idle[page_id] = None

    def publish(self, page_id: int, prefix_id: int, token_ids: tuple[int, ...]) -> int:
        """Offer a held page, written with token_ids after the prefix, for reuse. Returns the id of the prefix with it.

        If the cache has a page of the same content, that one stays, and this one is free when its owner lets go. One on
        the host gives way. A page after a prefix that was forgotten is not cached. A page that another of its holders
        has offered already stays what it is, though the prefix has got another id since.
        """
        assert len(token_ids) == self.page_size, f"a page of {self.page_size} is published with {len(token_ids)} tokens"
        assert self._references[page_id] > 0, f"page {page_id} is published but held by nobody"
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
        """What is to be copied between device and host, in this order, before pages given out since are touched."""
        transfers, self._transfers = tuple(self._transfers), []
        return transfers

    def forget(self, transfers: abc.Sequence[Transfer]) -> None:
        """These were perhaps not copied: nobody is to find what their destinations should hold."""
        for _, place in transfers:
            if self._keys[place] is None:
                continue
            self._give_up(place)
            if place >= self.num_pages:
                del self._host_idle[place]
                self._host_free.append(place)
            else:
                assert self._references[place] > 0, f"page {place} came back for nobody"

    def forget_prefixes(self) -> None:
        """Match nothing that is cached now ever again, on the device or the host: say so when the weights change.

        Pages that sequences hold stay theirs, and so do the transfers into them that were not yet taken. What such a
        sequence computes from then on depends on them, so it is not cached until it has been preempted.
        """
        self.root = next(self._prefix_ids)
        self._cached.clear()
        self._keys = [None] * len(self._keys)
        self._free = sorted([*self._free, *self._idle], reverse=True)
        self._host_free = sorted([*self._host_free, *self._host_idle], reverse=True)
        self._idle.clear()
        self._host_idle.clear()

    def drop_host(self) -> None:
        """Forget all that the host cache holds, and do without one from now on."""
        for place in self._host_idle:
            self._give_up(place)
        self._host_free.clear()
        self._host_idle.clear()
        self.num_host_pages = 0

    def _move_out(self, page_id: int) -> None:
        """A page's content, to the host if there is a page for it, for which the least recently used may give way."""
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
        """A page, held once, for what a page of the host holds, which is free then."""
        page_id = self.allocate()
        self._rename(host_id, page_id)
        self._host_free.append(host_id)
        self._transfers.append(Transfer(host_id, page_id))
        return page_id

    def _rename(self, source: int, destination: int) -> None:
        """The content of one page is found in another from now on."""
        key = self._keys[source]
        assert key is not None, f"page {source} holds nothing that could move"
        assert self._keys[destination] is None, f"page {destination} would hold two contents"
        self._keys[source], self._keys[destination] = None, key
        self._cached[key] = (destination, self._cached[key][1])

    def _give_up(self, place: int) -> None:
        """The content of a page is found no more."""
        key = self._keys[place]
        assert key is not None, f"page {place} holds nothing"
        del self._cached[key]
        self._keys[place] = None
        self.num_evictions += 1

    def check_invariants(self) -> None:
        """Assert that every page is in exactly one state and the cache is consistent. For tests: O(num_pages)."""
        held = [page_id for page_id, count in enumerate(self._references) if count > 0]
        assert sorted([*held, *self._free, *self._idle]) == list(range(self.num_pages)), "a page is lost or twice"
        places = range(self.num_pages, self.num_pages + self.num_host_pages)
        assert sorted([*self._host_free, *self._host_idle]) == list(places), "a page of the host is lost or twice"
        assert all(prefix_id >= self.root for prefix_id, _ in self._cached), "a page of a forgotten prefix is cached"
        keyed = {page_id: key for page_id, key in enumerate(self._keys) if key is not None}
        assert {page_id: key for key, (page_id, _) in self._cached.items()} == keyed, "the cache and its inverse differ"
        assert len(keyed) == len(self._cached), "two prefixes in one page"
        assert all(page_id in keyed for page_id in (*self._idle, *self._host_idle)), "an idle page without content"
        assert not any(page_id in keyed for page_id in (*self._free, *self._host_free)), "a free page with content"
