"""Speculative decoding: tokens that may come next are computed along with the one that does, in one pass.

A pass over few tokens takes as long as over one, for its time is that of reading the weights. So drafts, guessed by
something cheap, go in behind each sequence's last token, and every row draws: with its own parameters, penalties and
random number, as if the drafts before it had been drawn. It counts if they were. So drafts change what is computed
together, never what is drawn: an answer is, seed by seed, the one without them (to the bit with deterministic=True).
Source: Leviathan et al. 2023 (arXiv 2211.17192), Chen et al. 2023 (arXiv 2302.01318); theirs draw anew where a draft
is refused, which accepts more of a draft model's guesses, and gives other tokens of the same distribution.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from typing import Protocol

from fastllama.runtime.scheduler import Scheduler, Step
from fastllama.runtime.sequence import Sequence

ENOUGH = 3  # steps of a kind, until what they took is believed
RECENT = 8  # steps whose median is what a step takes
PERIOD = 64  # steps of one kind after which the other is tried again


class Drafter(Protocol):
    """What guesses tokens."""

    def follow(self, step: Step) -> None:
        """A step that the model is about to compute."""

    def propose(self, sequences: Items[Sequence], count: int) -> list[tuple[int, ...]]:
        """For each sequence `count` tokens that may come next, or none at all."""


class Pace:
    """Whether drafts pay, from the seconds that steps with and without them took, and the guesses that came true.

    count: drafts of a sequence. Until something is known of both kinds of steps, both are tried; and the one that
    loses is tried again now and then, for texts change.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._accepted = float(count)  # of a proposal, lately
        self._seconds: dict[tuple[int, bool], deque[float]] = {}
        self._run = 0  # steps of the last kind
        self._last = False

    def pays(self, num_seqs: int, num_proposals: int) -> bool:
        """Whether to extend a step of so many sequences, for so many of which there are drafts."""
        plain, drafted = (self._seconds.get((num_seqs, kind), ()) for kind in (False, True))
        if len(drafted) < ENOUGH:
            return True
        if len(plain) < ENOUGH:
            return False
        if self._run >= PERIOD:
            return not self._last
        gain = 1 + self._accepted * num_proposals / num_seqs
        return gain * statistics.median(plain) > statistics.median(drafted)

    def note(self, num_seqs: int, seconds: float, num_proposals: int, num_accepted: int) -> None:
        """What a step took and, where it was extended, how many drafts of its proposals came true."""
        drafted = num_proposals > 0
        self._seconds.setdefault((num_seqs, drafted), deque(maxlen=RECENT)).append(seconds)
        self._run = self._run + 1 if drafted is self._last else 1
        self._last = drafted
        if drafted:
            self._accepted += (num_accepted / num_proposals - self._accepted) / 8


class Speculation:
    """Extends decode steps by drafts where that pays. count: drafts of a sequence.

    num_drafted, num_accepted: guesses verified so far, and those that came true.
    """

    def __init__(self, drafter: Drafter, count: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.count = count
        self.num_drafted = self.num_accepted = 0
        self._drafter, self._clock = drafter, clock
        self._pace = Pace(count)
        self._start = 0.0
        self._proposals: dict[Sequence, tuple[int, ...]] = {}

    def begin(self, step: Step, scheduler: Scheduler) -> Step:
        """The step that is in flight, with drafts if it decodes only, if there is room for them, and if they pay."""
        self._start, self._proposals = self._clock(), {}
        self._drafter.follow(step)
        if step.num_decodes < len(step.chunks) or any(chunk.samples != (chunk.seq,) for chunk in step.chunks):
            return step
        sequences = [chunk.seq for chunk in step.chunks]
        num_seqs = len(sequences)
        if not self._pace.pays(num_seqs, num_seqs) or not scheduler.reserve(step, self.count):
            return step
        proposed = self._drafter.propose(sequences, self.count)
        self._proposals = {seq: drafts for seq, drafts in zip(sequences, proposed, strict=True) if drafts}
        if not self._proposals or not self._pace.pays(num_seqs, len(self._proposals)):
            self._proposals = {}
            return step
        # All decodes of a step are of one length: where nothing was guessed, any token will do.
        filler = [(seq.token_ids[-1],) * self.count for seq in sequences]
        return scheduler.extend(step, [drafts or other for drafts, other in zip(proposed, filler, strict=True)])

    def end(self, step: Step, gained: Mapping[Sequence, tuple[int, ...]]) -> None:
        """The step is over; gained: the tokens that count, of each sequence."""
        if step.num_decodes < len(step.chunks):
            return
        num_accepted = 0
        for seq in self._proposals:
            accepted = max(0, len(gained.get(seq, ())) - 1)
            seq.request.num_drafted += self.count
            seq.request.num_accepted += accepted
            num_accepted += accepted
        self.num_drafted += self.count * len(self._proposals)
        self.num_accepted += num_accepted
        self._pace.note(step.num_decodes, self._clock() - self._start, len(self._proposals), num_accepted)
