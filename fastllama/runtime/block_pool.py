"""The pages of the KV cache: who owns them, and which full pages can be reused because they hold a known prefix."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from fastllama.errors import check_range

ROOT = 0  # the prefix id of no tokens at all


class Prefix(NamedTuple):
    """A cached prefix: its pages in order, and the id under which the page that follows it is published."""

    page_ids: list[int]
    prefix_id: int


class BlockPool:
    """Page ids 0 .. num_pages - 1, each in one of three states.

    held: by one or more sequences, counted.
    idle: by none, but its content is a cached prefix that can be taken up again.
    free: by none, its content worthless. Allocation takes free pages first, then the least recently used idle one.

    A cached page's key is (prefix id of the pages before it, its own token ids), compared by equality. A prefix id
    names one sequence of tokens and is never given out again, so by induction equal keys mean equal tokens from the
    start: no hash is trusted. Every method costs O(1) per page, a match or publication O(page_size).
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        check_range("num_pages", num_pages, 1)
        check_range("page_size", page_size, 1)
        self.num_pages = num_pages
        self.page_size = page_size
        self.num_queried_tokens = 0  # tokens of all sequences given pages
        self.num_hit_tokens = 0  # those of them found in the cache
        self.num_evictions = 0  # idle pages whose content was given up
        self.num_publications = 0  # pages whose content was new to the cache
        self._references = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # a stack, so that low ids are used first
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._cached: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}  # key -> page, prefix id including it
        self._keys: list[tuple[int, tuple[int, ...]] | None] = [None] * num_pages  # the inverse: page -> key
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

    def match_prefix(self, token_ids: Sequence[int]) -> Prefix:
        """The longest cached prefix, not yet taken. The last token is never part of it: its logits must be computed."""
        size = self.page_size
        page_ids: list[int] = []
        prefix_id = ROOT
        for end in range(size, len(token_ids), size):
            found = self._cached.get((prefix_id, tuple(token_ids[end - size : end])))
            if found is None:
                break
            page_id, prefix_id = found
            page_ids.append(page_id)
        return Prefix(page_ids, prefix_id)

    def cost(self, num_tokens: int, prefix: Prefix) -> int:
        """How many of the available pages `acquire` takes: all that num_tokens fill but those that someone holds."""
        return self.pages_for(num_tokens) - sum(self._references[page_id] > 0 for page_id in prefix.page_ids)

    def acquire(self, num_tokens: int, prefix: Prefix) -> list[int] | None:
        """Pages for num_tokens, first those of a matched prefix. None, and nothing changed, if there are too few."""
        if self.cost(num_tokens, prefix) > self.num_available:
            return None
        cached = prefix.page_ids
        fresh = self.pages_for(num_tokens) - len(cached)
        self.num_queried_tokens += num_tokens
        self.num_hit_tokens += len(cached) * self.page_size
        self.share(cached)
        return cached + [self.allocate() for _ in range(fresh)]

    def allocate(self) -> int:
        """One page, its content undefined, held once. The caller has seen that one is available."""
        assert self.num_available, "allocate() from an exhausted pool"
        if self._free:
            page_id = self._free.pop()
        else:
            page_id, _ = self._idle.popitem(last=False)
            key = self._keys[page_id]
            assert key is not None
            del self._cached[key]
            self._keys[page_id] = None
            self.num_evictions += 1
        self._references[page_id] = 1
        return page_id

    def share(self, page_ids: Sequence[int]) -> None:
        """Hold pages once more: those of another sequence, or idle ones."""
        for page_id in page_ids:
            if self._references[page_id] == 0:
                del self._idle[page_id]
            self._references[page_id] += 1

    def free(self, page_ids: Sequence[int]) -> None:
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

        If the cache has a page of the same content, that one stays, and this one is free when its owner lets go.
        """
        assert len(token_ids) == self.page_size, f"a page of {self.page_size} is published with {len(token_ids)} tokens"
        assert self._references[page_id] > 0, f"page {page_id} is published but held by nobody"
        key = (prefix_id, token_ids)
        found = self._cached.get(key)
        if found is None:
            assert self._keys[page_id] is None, f"page {page_id} is published with two contents"
            found = self._cached[key] = (page_id, next(self._prefix_ids))
            self._keys[page_id] = key
            self.num_publications += 1
        return found[1]

    def check_invariants(self) -> None:
        """Assert that every page is in exactly one state and the cache is consistent. For tests: O(num_pages)."""
        held = [page_id for page_id, count in enumerate(self._references) if count > 0]
        assert sorted([*held, *self._free, *self._idle]) == list(range(self.num_pages)), "a page is lost or twice"
        keyed = {page_id: key for page_id, key in enumerate(self._keys) if key is not None}
        assert {page_id: key for key, (page_id, _) in self._cached.items()} == keyed, "the cache and its inverse differ"
        assert len(keyed) == len(self._cached), "two prefixes in one page"
        assert all(page_id in keyed for page_id in self._idle), "an idle page without content"
        assert not any(page_id in keyed for page_id in self._free), "a free page with content"
