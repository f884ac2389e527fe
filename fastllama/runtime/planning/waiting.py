"""The queue of waiting sequences: first come, first served, except that short prompts may pass long ones."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fastllama.runtime.planning.sequence import Sequence

LEAST_BLOCK = 64  # sequences: below this, one block is faster than several


class WaitingQueue:
    """Waiting sequences in order of admission.

    A new sequence passes, from the back, all whose patience is at least its length; the patience of the foremost one
    passed drops by that length. So it protects the sequences after it, which are delayed no more than itself.

    The queue is a list of blocks of about sqrt(n) sequences, each with its least patience, so that no operation costs
    more than O(sqrt(n)): a short prompt passes 10,000 long ones by whole blocks.
    """

    def __init__(self) -> None:
        self._blocks: list[_Block] = []  # none of them empty
        self._block_of: dict[Sequence, _Block] = {}

    def __len__(self) -> int:
        return len(self._block_of)

    def __iter__(self) -> Iterator[Sequence]:
        """Iterate in order of admission; the current sequence may be removed."""
        for block in list(self._blocks):
            yield from list(block.sequences)

    @property
    def head(self) -> Sequence:
        """The next sequence to admit. The queue must not be empty."""
        return self._blocks[0].sequences[0]

    def add(self, seq: Sequence) -> None:
        """Queue a sequence last, or before those at the end that let it pass."""
        length, index = len(seq.token_ids), len(self._blocks)
        while index > 0 and length <= self._blocks[index - 1].least:
            index -= 1
        if index == 0:
            passed = self.head if self._blocks else None
            self.put_first(seq)
        else:
            block = self._blocks[index - 1]
            place = len(block.sequences)
            while length <= block.sequences[place - 1].patience:  # some stop it, or the block would have been passed
                place -= 1
            following = block.sequences[place:] or (self._blocks[index].sequences if index < len(self._blocks) else [])
            passed = following[0] if following else None
            self._insert(block, place, seq)
        if passed is not None:
            passed.patience -= length
            self._block_of[passed].note(passed)

    def put_first(self, seq: Sequence) -> None:
        """Queue a preempted sequence before all others."""
        if not self._blocks:
            self._blocks.append(_Block([]))
        self._insert(self._blocks[0], 0, seq)

    def remove(self, seq: Sequence) -> None:
        """Remove a sequence from any place in the queue."""
        block = self._block_of.pop(seq)
        block.sequences.remove(seq)
        if not block.sequences:
            self._blocks.remove(block)
        elif seq.patience == block.least:
            block.look()

    def _insert(self, block: _Block, place: int, seq: Sequence) -> None:
        block.sequences.insert(place, seq)
        block.note(seq)
        self._block_of[seq] = block
        if len(block.sequences) > 2 * max(LEAST_BLOCK, math.isqrt(len(self))):
            half = len(block.sequences) // 2
            second = _Block(block.sequences[half:])
            del block.sequences[half:]
            block.look()
            self._blocks.insert(self._blocks.index(block) + 1, second)
            self._block_of.update(dict.fromkeys(second.sequences, second))


class _Block:
    """Adjacent sequences of the queue, and the least of their patience."""

    __slots__ = ("least", "sequences")
    least: float  # infinite if empty

    def __init__(self, sequences: list[Sequence]) -> None:
        self.sequences = sequences
        self.look()

    def look(self) -> None:
        """Recompute the least patience."""
        self.least = min((seq.patience for seq in self.sequences), default=math.inf)

    def note(self, seq: Sequence) -> None:
        """Update the least patience for a sequence that is new or whose patience dropped."""
        self.least = min(self.least, seq.patience)
