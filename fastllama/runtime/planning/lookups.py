"""What waiting sequences find in the prefix cache, and when it is worth while to look again."""

from __future__ import annotations

from collections import abc
from typing import NamedTuple

from fastllama.runtime.planning.block_pool import BlockPool, Prefix
from fastllama.runtime.planning.sequence import PageKey, Sequence, Status


class _Found(NamedTuple):
    """What the first sequence of the queue that waits for room asked for when it was last looked up."""

    seq_id: int
    num_tokens: int  # to compute
    num_pages: int  # of those available
    num_publications: int  # of the pool, by then


class Lookups:
    """Looks sequences up in a pool's prefix cache, as they are admitted one after another.

    A sequence that begins as the prompt of a running one does, behind what is cached, waits for the pages that they
    have in common instead of computing them too. It is compared once with the one that it waits for.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._coming: dict[PageKey, Sequence] = {}  # by the page that each publishes next
        self._last: _Found | None = None

    def begin(self, running: abc.Sequence[Sequence]) -> None:
        """Note which pages these will publish next, of their prompts, that the cache does not have."""
        self.end()
        for seq in running:
            self._note(seq)

    def end(self) -> None:
        """No more are admitted to this step: nothing is kept of the running sequences, which may end."""
        self._coming.clear()

    def admitted(self, seq: Sequence) -> None:
        """A sequence that was looked up has its pages, and computes the next ones of its prompt."""
        self._last, seq.awaits = None, None  # the idle pages that it took are held now, and cost nobody anything
        self._note(seq)

    def waits(self, seq: Sequence) -> bool:
        """Whether pages are still being computed for which it was found to wait."""
        if seq.awaits is None:
            return False
        other, count = seq.awaits
        if other.status is Status.RUNNING and other.num_published < count:
            return True
        seq.awaits = None
        return False

    def lacks_room(self, seq: Sequence, most: int | None) -> bool:
        """Whether the last lookup tells, without another, that it finds no room: each step asks, perhaps twice.

        most: tokens to compute that it may have. Until a sequence is admitted, only a page published since can spare it
        one, and the tokens in it.
        """
        last = self._last
        if last is None or last.seq_id != seq.seq_id:
            return False
        spared = self._pool.num_publications - last.num_publications
        return last.num_pages - spared > self._pool.num_available or (
            most is not None and last.num_tokens - spared * self._pool.page_size > most
        )

    def find(self, seq: Sequence) -> Prefix | None:
        """The cached prefix that it can reuse; None where it waits for pages that are being computed."""
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
        """Pages of the other's prompt that these tokens begin with, and that leave one of them to compute.

        known: tokens that are the same.
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
