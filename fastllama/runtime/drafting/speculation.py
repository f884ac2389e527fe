"""Speculative decoding: draft tokens are verified together with the next token, in one forward pass.

A pass over few tokens takes as long as over one, for its time is that of reading the weights. So draft tokens, which
something cheap proposes, go in behind each sequence's last token, and each row is sampled: with its own parameters,
penalties and random number, as if the drafts before it had been sampled. It counts if they were: drafts change what is
computed together, never what is sampled. An answer is, seed by seed, the one without them (to the bit with
deterministic=True).
Source: Leviathan et al. 2023 (arXiv 2211.17192), Chen et al. 2023 (arXiv 2302.01318); theirs draw anew where a draft
is refused, which accepts more of a draft model's guesses, and gives other tokens of the same distribution.
"""

from __future__ import annotations

import statistics
import time
from collections import abc, deque
from collections.abc import Callable, Mapping
from typing import Protocol

from fastllama.runtime.planning.scheduler import Scheduler
from fastllama.runtime.planning.sequence import Sequence
from fastllama.runtime.planning.step import Step

ENOUGH = 3  # steps of a kind, until what they took is believed
RECENT = 8  # steps whose median is what a step takes
PERIOD = 64  # steps of one kind after which the other is tried again


class Drafter(Protocol):
    """Proposes draft tokens."""

    def warm_up(self) -> float:
        """Do what is done at first use, before any request. Returns the seconds it took."""

    def follow(self, step: Step) -> None:
        """A step that the model is about to compute."""

    def propose(self, sequences: abc.Sequence[Sequence], count: int) -> list[tuple[int, ...]]:
        """For each sequence `count` tokens that may come next, or none at all."""

    def forget(self, sequences: abc.Sequence[Sequence]) -> None:
        """Drop what is kept of sequences that have ended; of some, nothing may be."""


class Pace:
    """Whether drafts pay, from the seconds that steps with and without them took, and the drafts accepted.

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
        """What a step took and, where it was extended, how many drafts of its proposals were accepted."""
        drafted = num_proposals > 0
        self._seconds.setdefault((num_seqs, drafted), deque(maxlen=RECENT)).append(seconds)
        self._run = self._run + 1 if drafted is self._last else 1
        self._last = drafted
        if drafted:
            self._accepted += (num_accepted / num_proposals - self._accepted) / 8


class Speculation:
    """Extends decode steps by drafts where that pays. count: drafts of a sequence.

    num_drafted, num_accepted: draft tokens verified so far, and those accepted.
    """

    def __init__(self, drafter: Drafter, count: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.count = count
        self.num_drafted = self.num_accepted = 0
        self.drafter, self._clock = drafter, clock
        self._pace = Pace(count)
        self._start = 0.0
        self._proposed: list[bool] = []  # whether drafts were found, of each chunk of the step if it was extended

    def reserve(self, step: Step, scheduler: Scheduler) -> bool:
        """Whether a step, just scheduled, may be extended: it only decodes, drafts pay, and they find pages."""
        self._start, self._proposed = self._clock(), []
        num_seqs = step.num_decodes
        return (
            num_seqs == len(step.chunks)
            and all(chunk.samples == (chunk.seq,) for chunk in step.chunks)
            and self._pace.pays(num_seqs, num_seqs)
            and scheduler.reserve(step, self.count)
        )

    def guess(self, step: Step) -> list[tuple[int, ...]] | None:
        """Drafts for each chunk of a step that may be extended; None if there are too few to pay."""
        # Logits processors are called once for each token, and with tokens that stay: nothing is drafted for them.
        drafted = [chunk.seq for chunk in step.chunks if not chunk.seq.request.params.logits_processors]
        if not drafted:
            return None
        proposals = dict(zip(drafted, self.drafter.propose(drafted, self.count), strict=True))
        proposed = [proposals.get(chunk.seq, ()) for chunk in step.chunks]
        found = [bool(drafts) for drafts in proposed]
        if not any(found) or not self._pace.pays(len(found), sum(found)):
            return None
        self._proposed = found
        # All decodes of a step are of one length: where nothing was proposed, any token will do.
        return [
            drafts or (chunk.seq.token_ids[-1],) * self.count
            for chunk, drafts in zip(step.chunks, proposed, strict=True)
        ]

    def follow(self, step: Step) -> None:
        """A step as it was scheduled is about to be computed."""
        self.drafter.follow(step)

    def end(self, step: Step, gained: Mapping[Sequence, tuple[int, ...]]) -> None:
        """The step is over; gained: the tokens that count, of each sequence."""
        if step.num_decodes < len(step.chunks):
            return
        num_accepted = 0
        # Empty, or one for each chunk. Sequences are not kept from step to step, or what has ended would be.
        for chunk, found in zip(step.chunks, self._proposed, strict=False):
            if found:
                accepted = max(0, len(gained.get(chunk.seq, ())) - 1)
                chunk.seq.request.num_drafted += self.count
                chunk.seq.request.num_accepted += accepted
                num_accepted += accepted
        num_proposals = sum(self._proposed)
        self.num_drafted += self.count * num_proposals
        self.num_accepted += num_accepted
        self._pace.note(step.num_decodes, self._clock() - self._start, num_proposals, num_accepted)

    def forget(self, sequences: abc.Sequence[Sequence]) -> None:
        """Sequences have ended, on whatever path: nothing is kept of them."""
        self.drafter.forget(sequences)
