"""Drafts from the text itself: what followed the last time that the newest tokens occurred together."""

from __future__ import annotations

from collections import abc

from fastllama.runtime.planning.sequence import Request, Sequence
from fastllama.runtime.planning.step import Step

PROMPT_LOOKUP = "prompt_lookup"  # its name among options
# Of the runs of tokens looked for: the longer says more of what follows, the shorter is found more often.
SIZES = (4, 2)


class PromptLookup:
    """Proposes for each sequence what followed the latest earlier occurrence of its last 4 tokens, or else of 2.

    Answers that repeat their prompt, as summaries, edits and code do, are drafted so for nothing but a lookup.
    Source: Saxena, Prompt Lookup Decoding (2023), https://github.com/apoorvumang/prompt-lookup-decoding.
    """

    def __init__(self) -> None:
        self._indices: dict[Sequence, _Index] = {}
        self._prompts: dict[Request, _Index] = {}  # that the samples of a request share

    def warm_up(self) -> float:
        """Nothing to do."""
        return 0.0

    def follow(self, step: Step) -> None:
        """Nothing to do: what a sequence holds is read when drafts are wanted."""

    def propose(self, sequences: abc.Sequence[Sequence], count: int) -> list[tuple[int, ...]]:
        """For each sequence `count` tokens that may come next, or none at all."""
        return [self._index(seq).continuation(seq.token_ids, count) for seq in sequences]

    def forget(self, sequences: abc.Sequence[Sequence]) -> None:
        """Drop the indices of sequences that have ended."""
        for seq in sequences:
            self._indices.pop(seq, None)
            self._prompts.pop(seq.request, None)

    def _index(self, seq: Sequence) -> _Index:
        found, request = self._indices.get(seq), seq.request
        if found is None:
            prompt = self._prompts.get(request)
            if prompt is None and request.params.n > 1:
                prompt = self._prompts[request] = _Index()
                prompt.follow(request.prompt_token_ids)
            found = self._indices[seq] = _Index(prompt)
        return found


class _Index:
    """Where each run of SIZES tokens was last followed by another token, of one sequence that only grows.

    before: that of the tokens which it begins with, if there is one.
    """

    def __init__(self, before: _Index | None = None) -> None:
        self._before = before
        self._behind: tuple[dict[tuple[int, ...], int], ...] = tuple({} for _ in SIZES)  # run -> what follows it
        self._num_seen: int = 0 if before is None else before._num_seen  # tokens that have followed a run

    def follow(self, token_ids: abc.Sequence[int]) -> None:
        """Take in the tokens that are new."""
        for place in range(self._num_seen, len(token_ids)):
            for size, behind in zip(SIZES, self._behind, strict=True):
                if place >= size:
                    behind[tuple(token_ids[place - size : place])] = place
        self._num_seen = len(token_ids)

    def continuation(self, token_ids: list[int], count: int) -> tuple[int, ...]:
        """What followed the tokens' end, where it occurred before; what would run past the end begins again."""
        self.follow(token_ids)
        for number, size in enumerate(SIZES):
            first = self._last(number, tuple(token_ids[-size:]))
            if first is not None:
                period = len(token_ids) - first
                return tuple(token_ids[first + i % period] for i in range(count))
        return ()

    def _last(self, number: int, run: tuple[int, ...]) -> int | None:
        """What followed a run of the size of this number the last time."""
        found = self._behind[number].get(run)
        return self._before._last(number, run) if found is None and self._before is not None else found
