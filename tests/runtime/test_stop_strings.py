"""The search for stop strings: it finds what a plain search finds, in time that does not depend on their number."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastllama import SamplingParams
from fastllama.runtime.generation import TextStream
from fastllama.runtime.stop_strings import StopStrings, StringAutomaton
from tests.runtime.test_generation import Pieces


@given(
    strings=st.lists(st.text("ab", min_size=1, max_size=5), max_size=5, unique=True),
    text=st.text("ab", max_size=20),
)
def test_each_state_says_what_the_text_ends_with_and_what_it_may_become(strings: list[str], text: str) -> None:
    automaton, state = StringAutomaton(tuple(strings)), 0
    for end in range(len(text) + 1):
        seen = text[:end]
        ended = [string for string in strings if seen.endswith(string)]
        begun = [n for n in range(1, end + 1) for string in strings if len(string) > n and string.startswith(seen[-n:])]
        assert automaton.found[state] == max(ended, key=len, default=None)
        assert automaton.held[state] == max(begun, default=0)
        state = automaton.step(state, text[end]) if end < len(text) else state


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


def test_samples_of_a_request_share_the_search() -> None:
    tokenizer, params = Pieces([b"a"]), SamplingParams(stop=["stop", "end"], n=2)
    one, other = StopStrings(tokenizer, params), StopStrings(tokenizer, params)
    assert one.automaton is other.automaton


@pytest.mark.parametrize("min_tokens", range(6))
def test_a_stop_string_counts_from_the_token_that_completes_it(min_tokens: int) -> None:
    """Pieces a, b, c, a, b: "ab" is complete with the second and the fifth, "ca" with the fourth."""
    stream = TextStream(Pieces([b"a", b"b", b"c"]), (1,), SamplingParams(stop=["ab", "ca"]))
    reached = [stream.push(token, may_stop=place > min_tokens) for place, token in enumerate((4, 5, 6, 4, 5), 1)]
    first = {0: 2, 1: 2, 2: 4, 3: 4, 4: 5, 5: None}[min_tokens]
    assert next((place for place, stop in enumerate(reached, 1) if stop), None) == first
