"""Prompt lookup proposes what followed the last time, from one index of a prompt for all samples of a request."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fastllama import SamplingParams
from fastllama.runtime.drafting.prompt_lookup import SIZES, PromptLookup
from fastllama.runtime.planning.sequence import Request, Sequence

TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=30)


def samples_of(prompt: list[int], n: int) -> list[Sequence]:
    request = Request("", tuple(prompt), SamplingParams(n=n), 0.0)
    request.sequences = [Sequence(index, request, index, list(prompt), 999, 1) for index in range(n)]
    return request.sequences


def by_hand(token_ids: list[int], count: int) -> tuple[int, ...]:
    """Proposes what followed the latest earlier occurrence of the last tokens, again and again."""
    for size in SIZES:
        end = token_ids[-size:]
        for place in range(len(token_ids) - 1, size - 1, -1):
            if token_ids[place - size : place] == end:
                found = token_ids[place:]
                return tuple(found[i % len(found)] for i in range(count))
    return ()


@given(prompt=TOKENS, answers=st.lists(TOKENS, min_size=1, max_size=3), count=st.integers(1, 7))
def test_drafts_are_what_followed_the_last_time(prompt: list[int], answers: list[list[int]], count: int) -> None:
    drafter, samples = PromptLookup(), samples_of(prompt, len(answers))
    assert drafter.propose(samples, count) == [by_hand(prompt, count)] * len(samples)
    for seq, answer in zip(samples, answers, strict=True):
        for token_id in answer:
            seq.token_ids.append(token_id)
            assert drafter.propose([seq], count) == [by_hand(seq.token_ids, count)]


def test_samples_share_the_index_of_their_prompt() -> None:
    drafter, samples = PromptLookup(), samples_of(list(range(500)), 8)
    drafter.propose(samples, 3)
    indices = {id(index): index for each in drafter._indices.values() for index in (each, each._before)}
    assert sum(len(positions) for index in indices.values() if index for positions in index._next) < 2 * 500
    drafter.forget(samples)
    assert not drafter._indices
    assert not drafter._prompts
