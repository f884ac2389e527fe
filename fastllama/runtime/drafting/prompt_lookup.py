"""Draft tokens by prompt lookup: the continuation of the last earlier occurrence of the newest tokens."""

from __future__ import annotations

from collections import abc

from fastllama.runtime.planning.sequence import Request, Sequence
from fastllama.runtime.planning.step import Step

PROMPT_LOOKUP = "prompt_lookup"  # its name among the options
# Lengths of the n-grams looked up: a longer one predicts better, a shorter one is found more often.
SIZES = (4, 2)


class PromptLookup:
    """Proposes for each sequence what followed the latest earlier occurrence of its last 4, or else 2, tokens.

    Answers that repeat their prompt (summaries, edits, source code) get drafts for the cost of a lookup.
    Source: Saxena, Prompt Lookup Decoding (2023), https://github.com/apoorvumang/prompt-lookup-decoding.
    """

    def __init__(self) -> None:
        self._indices: dict[Sequence, _Index] = {}
        self._prompts: dict[Request, _Index] = {}  # shared by the samples of a request

    def warm_up(self) -> float:
        """Does nothing; returns 0."""
        return 0.0

    def follow(self, step: Step) -> None:
        """Does nothing: the tokens of a sequence are read in `propose`."""

    def propose(self, sequences: abc.Sequence[Sequence], count: int) -> list[tuple[int, ...]]:
        """Returns `count` draft tokens for each sequence, or none."""
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
    """The last position after each n-gram of SIZES, in one sequence that only grows.

    before: the index of the sequence's prompt, if there is one.
    """

    def __init__(self, before: _Index | None = None) -> None:
        self._before = before
        self._next: tuple[dict[tuple[int, ...], int], ...] = tuple({} for _ in SIZES)  # n-gram -> position after it
        self._num_seen: int = 0 if before is None else before._num_seen  # tokens indexed

    def follow(self, token_ids: abc.Sequence[int]) -> None:
        """Index the new tokens."""
        for place in range(self._num_seen, len(token_ids)):
            for size, positions in zip(SIZES, self._next, strict=True):
                if place >= size:
                    positions[tuple(token_ids[place - size : place])] = place
        self._num_seen = len(token_ids)

    def continuation(self, token_ids: list[int], count: int) -> tuple[int, ...]:
        """Returns what followed an earlier occurrence of the tokens' end, repeated where it runs past the end."""
        self.follow(token_ids)
        for number, size in enumerate(SIZES):
            first = self._last(number, tuple(token_ids[-size:]))
            if first is not None:
                period = len(token_ids) - first
                return tuple(token_ids[first + i % period] for i in range(count))
        return ()

    def _last(self, number: int, run: tuple[int, ...]) -> int | None:
        """Position after the last occurrence of an n-gram of size SIZES[number]; None if there is none."""
        found = self._next[number].get(run)
        return self._before._last(number, run) if found is None and self._before is not None else found
