"""Drafts from a smaller model of the same vocabulary."""

from __future__ import annotations

from collections.abc import Sequence as Items

from fastllama.runtime import sampler
from fastllama.runtime.runner import Runner
from fastllama.runtime.scheduler import Chunk, Step
from fastllama.runtime.sequence import Sequence, Status


class DraftModel:
    """Proposes what a smaller model draws, with the same parameters and random numbers as the large one will.

    runner: of the smaller model, over pages of the same numbers and sizes: where the large one has a token's keys and
    values, it has its own, in the same page. So what is shared, copied or kept of pages is so of both, and nothing is
    kept book of but how many tokens of a sequence it has computed. Where that is wrong, for a prefix came from the
    cache and was computed while drafts did not pay, drafts are worse, and no answer is.
    max_num_tokens: of a pass.
    """

    def __init__(self, runner: Runner, max_num_tokens: int) -> None:
        self._runner, self._max_num_tokens = runner, max_num_tokens
        self._held: dict[Sequence, tuple[int, tuple[int, ...]]] = {}  # tokens computed, and drafts behind them

    def follow(self, step: Step) -> None:
        """Compute the step too, if there is more in it than decodes: these are cheaper together, before a guess."""
        if step.num_decodes == len(step.chunks):
            self._runner.copy(step)
            return
        self._runner.run(step)
        for chunk in step.chunks:
            for seq in chunk.samples or (chunk.seq,):
                self._held[seq] = chunk.start + chunk.length, ()

    def propose(self, sequences: Items[Sequence], count: int) -> list[tuple[int, ...]]:
        """For each sequence `count` tokens, drawn one after another; none where one has but a single token."""
        self._forget()
        if any(len(seq.token_ids) < 2 for seq in sequences):
            return [()] * len(sequences)
        for seq in sequences:
            self._catch_up(seq)
        # The first pass takes two tokens: of the drafts of a step that accepted all, the last was not computed.
        chunks = [Chunk(seq, len(seq.token_ids) - 2, 2, (seq,)) for seq in sequences]
        for number in range(count):
            draws = sampler.draw(self._runner.run(Step(tuple(chunks), num_decodes=len(chunks), copies=())))
            chunks = [
                Chunk(drawn.seq, len(drawn.seq.token_ids) + number, 1, (drawn.seq,), (*drawn.ahead, drawn.token_id))
                for drawn in draws
            ]
        for chunk in chunks:
            self._held[chunk.seq] = len(chunk.seq.token_ids), chunk.drafts[:-1]
        return [chunk.drafts for chunk in chunks]

    def _catch_up(self, seq: Sequence) -> None:
        """Compute what a sequence gained while there were no guesses, but for its last two tokens."""
        start, drafts = self._held.get(seq, (0, ()))
        for token_id, draft in zip(seq.token_ids[start:], drafts, strict=False):
            if token_id != draft:
                break
            start += 1
        end = len(seq.token_ids) - 2
        while start < end:
            length = min(end - start, self._max_num_tokens)
            self._runner.run(Step((Chunk(seq, start, length, ()),), num_decodes=0, copies=()))
            start += length

    def _forget(self) -> None:
        for seq in [seq for seq in self._held if seq.status is Status.FINISHED]:
            del self._held[seq]
