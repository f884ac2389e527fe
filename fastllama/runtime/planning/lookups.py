"""Prefix cache lookups of waiting sequences, and when to repeat them."""

from __future__ import annotations

from collections import abc
from typing import NamedTuple

from fastllama.runtime.planning.block_pool import BlockPool, Prefix
from fastllama.runtime.planning.sequence import PageKey, Sequence, Status


class _Found(NamedTuple):
    """The last lookup of the first waiting sequence that found no room."""

    seq_id: int
    num_tokens: int  # to compute
    num_pages: int  # of the available pages
    num_publications: int  # of the pool, at that time


class Lookups:
    """Looks waiting sequences up in the prefix cache as they are admitted.

    A sequence whose prompt shares its next pages with a running one waits for those pages instead of computing them
    too. The two prompts are compared once.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._coming: dict[PageKey, Sequence] = {}  # by the key of the page that each publishes next
        self._last: _Found | None = None

    def begin(self, running: abc.Sequence[Sequence]) -> None:
        """Note which prompt pages these sequences will publish next, where the cache does not have them."""
        self.end()
        for seq in running:
            self._note(seq)

    def end(self) -> None:
        """End the admissions of a step: drop references to running sequences, which may end."""
        self._coming.clear()

    def admitted(self, seq: Sequence) -> None:
        """Note that a sequence was admitted: it has pages, and computes the next ones of its prompt."""
        self._last, seq.awaits = None, None  # the idle pages that it took are held now, and need no further page
        self._note(seq)

    def waits(self, seq: Sequence) -> bool:
        """Whether the sequence still waits for pages that another one is computing."""
        if seq.awaits is None:
            return False
        other, count = seq.awaits
        if other.status is Status.RUNNING and other.num_published < count:
            return True
        seq.awaits = None
        return False

    def lacks_room(self, seq: Sequence, most: int | None) -> bool:
        """Whether the last lookup shows, without another, that there is no room; called up to twice a step.

        most: limit of tokens to compute. Until a sequence is admitted, only a page published since can save it a page,
        and that page's tokens.
        """
        last = self._last
        if last is None or last.seq_id != seq.seq_id:
            return False
        spared = self._pool.num_publications - last.num_publications
        return last.num_pages - spared > self._pool.num_available or (
            most is not None and last.num_tokens - spared * self._pool.page_size > most
        )

    def find(self, seq: Sequence) -> Prefix | None:
        """Returns the cached prefix that it can reuse; None if it waits for pages that are being computed."""
        size, reusable = self._pool.page_size, seq.reusable
        prefix = self._pool.match_prefix(reusable)
        num_cached = len(prefix.page_ids) * size
        if num_cached + size < len(reusable):
            other = self._coming.get((prefix.prefix_id, tuple(reusable[num_cached : num_cached + size])))
            if other is not None:
                seq.awaits = other, self._common(reusable, other, num_cached + size)
                return None
        length, pool = len(seq.token_ids), self._pool
        self._last = _Found(seq.seq_id, length - num_cached, pool.cost(length, prefix), pool.num_publications)
        return prefix

    def _common(self, reusable: abc.Sequence[int], other: Sequence, known: int) -> int:
        """Number of pages that the other's prompt shares with these tokens, leaving at least one token to compute.

        known: tokens known to be equal.
        """
        size, prompt = self._pool.page_size, other.request.prompt_token_ids
        end = known + size
        while (
            end < len(reusable) and end <= len(prompt) and tuple(reusable[end - size : end]) == prompt[end - size : end]
        ):
            end += size
        return end // size - 1

    def _note(self, seq: Sequence) -> None:
        key = seq.page_key(self._pool.page_size)
        if key is not None and not self._pool.is_cached(*key):
            self._coming[key] = seq
