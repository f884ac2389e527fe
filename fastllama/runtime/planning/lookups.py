"""What waiting sequences find in the prefix cache, and when it is worth while to look again."""

from __future__ import annotations

from collections import abc
from typing import NamedTuple

from fastllama.runtime.planning.block_pool import BlockPool, Prefix
from fastllama.runtime.planning.sequence import PageKey, Sequence


class _Found(NamedTuple):
    """What the first sequence of the queue that waits for room asked for when it was last looked up."""

    seq: Sequence
    num_tokens: int  # to compute
    num_pages: int  # of those available
    num_publications: int  # of the pool, by then


class Lookups:
    """Looks sequences up in a pool's prefix cache, as they are admitted one after another.

    A sequence whose next page a running one is computing waits for that page instead of computing it too.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._coming: set[PageKey] = set()
        self._last: _Found | None = None

    def begin(self, running: abc.Sequence[Sequence]) -> None:
        """Note which pages these will publish next, of their prompts, that the cache does not have."""
        self._coming = self._next_pages(running)

    def admitted(self, seq: Sequence) -> None:
        """A sequence that was looked up has its pages, and computes the next ones of its prompt."""
        self._last, seq.awaits = None, None  # the idle pages that it took are held now, and cost nobody anything
        self._coming |= self._next_pages([seq])

    def waits(self, seq: Sequence) -> bool:
        """Whether a page is still being computed for which it was found to wait."""
        return seq.awaits is not None and seq.awaits in self._coming

    def lacks_room(self, seq: Sequence, most: int | None) -> bool:
        """Whether the last lookup tells, without another, that it finds no room: each step asks, perhaps twice.

        most: tokens to compute that it may have. Until a sequence is admitted, only a page published since can spare it
        one, and the tokens in it.
        """
        last = self._last
        if last is None or last.seq is not seq:
            return False
        spared = self._pool.num_publications - last.num_publications
        return last.num_pages - spared > self._pool.num_available or (
            most is not None and last.num_tokens - spared * self._pool.page_size > most
        )

    def find(self, seq: Sequence) -> Prefix | None:
        """The cached prefix that it can reuse; None where it waits for a page that is being computed."""
        size, reusable = self._pool.page_size, seq.reusable
        prefix = self._pool.match_prefix(reusable)
        num_cached = len(prefix.page_ids) * size
        end = num_cached + size
        seq.awaits = (prefix.prefix_id, tuple(reusable[num_cached:end])) if end < len(reusable) else None
        if self.waits(seq):
            return None
        length, pool = len(seq.token_ids), self._pool
        self._last = _Found(seq, length - num_cached, pool.cost(length, prefix), pool.num_publications)
        return prefix

    def _next_pages(self, running: abc.Sequence[Sequence]) -> set[PageKey]:
        keys = (seq.page_key(self._pool.page_size) for seq in running)
        return {key for key in keys if key is not None and not self._pool.is_cached(*key)}
