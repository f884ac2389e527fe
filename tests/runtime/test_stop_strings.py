"""The search for stop strings finds what a plain search finds, in time that does not depend on their number."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastllama import SamplingParams
from fastllama.runtime.generation import TextStream
from fastllama.runtime.stop_strings import StopSearch, StopStrings, stop_strings
from tests.runtime.test_generation import Pieces, spelling


@given(
    strings=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=5),
    text=st.text("ab", max_size=20),
    early=st.integers(0, 20),
)
def test_the_first_string_that_is_complete_late_enough_is_found(strings: list[str], text: str, early: int) -> None:
    """Letter by letter; all text is released that cannot become part of a stop string."""
    search, released = StopSearch(StopStrings(Pieces([]), SamplingParams(stop=strings))), ""
    for end in range(1, len(text) + 1):
        certain, stop = search.push(text[end - 1], may_stop=end > early)
        released += certain
        ended = [string for string in strings if text[:end].endswith(string) and end > early]
        assert stop == max(ended, key=len, default=None)
        if stop is not None:
            assert released == text[: end - len(stop)]
            return
        begun = [
            n for n in range(1, end + 1) for each in strings if len(each) > n and each.startswith(text[end - n : end])
        ]
        assert released == text[: end - max(begun, default=0)]
        assert released + search.held == text[:end]


def test_ten_thousand_stop_strings_take_no_longer_than_four() -> None:
    letters = random.Random(0)
    stops = ["".join(letters.choices("abcdefgh", k=12)) for _ in range(10_000)]
    tokenizer = Pieces([b"abc", b"def", b"gh", b" "])
    tokens = [letters.randrange(4, 8) for _ in range(2000)]

    def seconds(count: int) -> float:
        best = 1e9
        for _ in range(5):
            stream = TextStream(tokenizer, (1,), SamplingParams(stop=stops[:count]))
            start = time.perf_counter()
            for token in tokens:
                stream.push(token)
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(10_000) < 4 * seconds(4), "a plain search takes a thousand times as long"


def test_samples_of_a_request_share_the_stop_strings() -> None:
    with spelling(["a", "b"]) as (llm, _):
        generation = llm.engine.add_request([1], SamplingParams(stop=["stop", "end"], n=3))
        while not generation.finished:
            llm.engine.step()
    streams = [sample.stream for sample in generation.samples.values()]
    assert len(streams) == 3
    assert len({id(stream._search.stops) for stream in streams if stream is not None}) == 1


@pytest.mark.parametrize("min_tokens", range(6))
def test_a_stop_string_counts_from_the_token_that_completes_it(min_tokens: int) -> None:
    """Pieces a, b, c, a, b: "ab" is complete with the second and the fifth, "ca" with the fourth."""
    stream = TextStream(Pieces([b"a", b"b", b"c"]), (1,), SamplingParams(stop=["ab", "ca"]))
    reached = [stream.push(token, may_stop=place > min_tokens) for place, token in enumerate((4, 5, 6, 4, 5), 1)]
    first = {0: 2, 1: 2, 2: 4, 3: 4, 4: 5, 5: None}[min_tokens]
    assert next((place for place, stop in enumerate(reached, 1) if stop), None) == first


def test_requests_with_the_same_strings_share_them() -> None:
    pieces, params = Pieces([]), SamplingParams(stop=("one", "two"))
    shared = stop_strings(pieces, params)
    assert stop_strings(pieces, SamplingParams(stop=("one", "two"), temperature=0)) is shared
    assert stop_strings(pieces, SamplingParams(stop=("one",))) is not shared
    assert stop_strings(Pieces([]), params) is not shared
