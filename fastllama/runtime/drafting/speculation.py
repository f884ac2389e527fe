"""Speculative decoding: draft tokens are verified together with the next token, in one forward pass.

A pass over few tokens takes as long as over one, because it is bound by reading the weights. So draft tokens from a
cheap drafter follow each sequence's last token, and a token is sampled in each row: with the parameters, penalties and
random number that it would have if the drafts before it were accepted. It counts only if they are: drafts change which
tokens are computed together, never which are sampled. For a given seed, the answer is the one without drafts
(bit-identical with deterministic=True).
Source: Leviathan et al. 2023 (arXiv 2211.17192), Chen et al. 2023 (arXiv 2302.01318). Their rejection sampling accepts
more of a draft model's tokens, and gives other tokens of the same distribution.
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

ENOUGH = 3  # steps of a kind that must be timed before the kinds are compared
RECENT = 8  # steps whose median is a kind's time
PERIOD = 64  # steps of one kind after which the other is retried


class Drafter(Protocol):
    """The interface of a drafter, which proposes draft tokens."""

    def warm_up(self) -> float:
        """Compile kernels and capture steps before the first request. Returns the seconds it took."""

    def follow(self, step: Step) -> None:
        """Observe a step that the model is about to compute."""

    def propose(self, sequences: abc.Sequence[Sequence], count: int) -> list[tuple[int, ...]]:
        """Returns `count` draft tokens for each sequence, or none."""

    def forget(self, sequences: abc.Sequence[Sequence]) -> None:
        """Drop the state of sequences that have ended; some may have none."""


class Pace:
    """Decides whether drafts pay, from the times of plain and of speculative steps and the drafts accepted.

    count: drafts of a sequence. Both kinds of steps are tried first; the slower kind is then switched off, and retried
    every PERIOD steps, since texts change.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._accepted = float(count)  # per proposal, moving average
        self._seconds: dict[tuple[int, bool], deque[float]] = {}
        self._run = 0  # steps of the last kind
        self._last = False

    def pays(self, num_seqs: int, num_proposals: int) -> bool:
        """Whether to extend a step of num_seqs sequences, num_proposals of which have drafts."""
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
        """Record the time of a step and, if it was extended, how many drafts of its proposals were accepted."""
        drafted = num_proposals > 0
        self._seconds.setdefault((num_seqs, drafted), deque(maxlen=RECENT)).append(seconds)
        self._run = self._run + 1 if drafted is self._last else 1
        self._last = drafted
        if drafted:
            self._accepted += (num_accepted / num_proposals - self._accepted) / 8


class Speculation:
    """Extends decode steps by draft tokens where that pays. count: drafts of a sequence.

    num_drafted, num_accepted: draft tokens verified so far, and draft tokens accepted.
    """

    def __init__(self, drafter: Drafter, count: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.count = count
        self.num_drafted = self.num_accepted = 0
        self.drafter, self._clock = drafter, clock
        self._pace = Pace(count)
        self._start = 0.0
        self._proposed: list[bool] = []  # of each chunk of an extended step, whether it has drafts

    def reserve(self, step: Step, scheduler: Scheduler) -> bool:
        """Whether a scheduled step may be extended: it only decodes, drafts pay, and their pages are reserved."""
        self._start, self._proposed = self._clock(), []
        num_seqs = step.num_decodes
        return (
            num_seqs == len(step.chunks)
            and all(chunk.samples == (chunk.seq,) for chunk in step.chunks)
            and self._pace.pays(num_seqs, num_seqs)
            and scheduler.reserve(step, self.count)
        )

    def draft(self, step: Step) -> list[tuple[int, ...]] | None:
        """Returns drafts for each chunk of a step that may be extended; None if there are too few to pay."""
        # Logits processors must see each token once, and only accepted ones: such requests get no drafts.
        drafted = [chunk.seq for chunk in step.chunks if not chunk.seq.request.params.logits_processors]
        if not drafted:
            return None
        proposals = dict(zip(drafted, self.drafter.propose(drafted, self.count), strict=True))
        proposed = [proposals.get(chunk.seq, ()) for chunk in step.chunks]
        found = [bool(drafts) for drafts in proposed]
        if not any(found) or not self._pace.pays(len(found), sum(found)):
            return None
        self._proposed = found
        # All decodes of a step have the same length: sequences without drafts get arbitrary tokens.
        return [
            drafts or (chunk.seq.token_ids[-1],) * self.count
            for chunk, drafts in zip(step.chunks, proposed, strict=True)
        ]

    def follow(self, step: Step) -> None:
        """Pass the drafter a step, as it was scheduled, that is about to be computed."""
        self.drafter.follow(step)

    def end(self, step: Step, gained: Mapping[Sequence, tuple[int, ...]]) -> None:
        """Record the results of a step; gained: the tokens accepted of each sequence."""
        if step.num_decodes < len(step.chunks):
            return
        num_accepted = 0
        # Empty, or one for each chunk. No sequences are kept between steps, so that ended ones are freed.
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
        """Drop the state of sequences that have ended in any way."""
        self.drafter.forget(sequences)
