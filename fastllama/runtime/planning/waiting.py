"""The queue of sequences that wait to be admitted: one of arrival, in which short prompts may pass long ones."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fastllama.runtime.planning.sequence import Sequence

LEAST_BLOCK = 64  # sequences: up to here one block is faster than several


class WaitingQueue:
    """Sequences in the order in which they are to be admitted.

    A new one passes, from the back, all whose patience is at least its length, and the foremost of those passed pays:
    its patience is less by that length. So it guards those behind it, which are delayed no more than itself.

    The queue is a list of blocks of about sqrt(n) sequences, each block with the least patience in it, so that nothing
    takes more than O(sqrt(n)): of 10,000 long prompts, a short one passes whole blocks.
    """

    def __init__(self) -> None:
        self._blocks: list[_Block] = []  # none of them empty
        self._block_of: dict[Sequence, _Block] = {}

    def __len__(self) -> int:
        return len(self._block_of)

    def __iter__(self) -> Iterator[Sequence]:
        """From the first to be admitted to the last; the one at hand may be removed."""
        for block in list(self._blocks):
            yield from list(block.sequences)

    @property
    def head(self) -> Sequence:
        """The next to be admitted, of a queue that is not empty."""
        return self._blocks[0].sequences[0]

    def add(self, seq: Sequence) -> None:
        """Queue a sequence behind all that wait, but for those that let it pass."""
        length, index = len(seq.token_ids), len(self._blocks)
        while index > 0 and length <= self._blocks[index - 1].least:
            index -= 1
        if index == 0:
            passed = self.head if self._blocks else None
            self.put_first(seq)
        else:
            block = self._blocks[index - 1]
            place = len(block.sequences)
            while length <= block.sequences[place - 1].patience:  # not of all, or the block would have been passed
                place -= 1
            behind = block.sequences[place:] or (self._blocks[index].sequences if index < len(self._blocks) else [])
            passed = behind[0] if behind else None
            self._insert(block, place, seq)
        if passed is not None:
            passed.patience -= length
            self._block_of[passed].note(passed)

    def put_first(self, seq: Sequence) -> None:
        """Queue a sequence before all others."""
        if not self._blocks:
            self._blocks.append(_Block([]))
        self._insert(self._blocks[0], 0, seq)

    def remove(self, seq: Sequence) -> None:
        """Take a sequence out, wherever it stands."""
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
    """Neighbours in the queue, and the least patience of them."""

    __slots__ = ("least", "sequences")
    least: float  # infinite of none

    def __init__(self, sequences: list[Sequence]) -> None:
        self.sequences = sequences
        self.look()

    def look(self) -> None:
        """Find the least patience anew."""
        self.least = min((seq.patience for seq in self.sequences), default=math.inf)

    def note(self, seq: Sequence) -> None:
        """One of the sequences is new, or has less patience than before."""
        self.least = min(self.least, seq.patience)
