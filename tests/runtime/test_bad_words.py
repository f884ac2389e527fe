"""Bad words as token sequences: each spelling once, inside a text, and the bans that follow which tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastllama.io.tokenizer import Tokenizer
from fastllama.runtime.bad_words import BadWords, bad_words, token_sequences
from tests.io.tokenizer_samples import tokenizer
from tests.runtime.test_generation import Pieces


@given(
    sequences=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), max_size=4),
    generated=st.lists(st.integers(0, 2), max_size=8),
)
def test_a_token_is_banned_where_it_completes_a_sequence(sequences: list[list[int]], generated: list[int]) -> None:
    ends = {token for token in range(3) for each in sequences if [*generated, token][-len(each) :] == each}
    words = BadWords(sequences)
    assert words.single | words.completing(generated) == ends


@pytest.mark.parametrize("kind", ["tiny", "tiny-prepend", "tiny-metaspace", "llama2"])
@pytest.mark.parametrize("word", ["the", " the", "once upon", "don't", "\n", "☺", "  ", " "])
def test_a_word_is_banned_with_and_without_a_leading_space(kind: str, word: str) -> None:
    known = tokenizer(kind)
    before = known.encode("end", bos=False)
    texts = [known.decode([*before, *ids]).removeprefix("end") for ids in token_sequences(known, [word])]
    assert texts == ([word.lstrip(" "), f" {word.lstrip(' ')}"] if word.strip(" ") else [word])


@pytest.mark.parametrize("kind", ["tiny", "tiny-prepend", "llama2"])
def test_what_a_text_is_encoded_to_holds_its_words(kind: str) -> None:
    known = tokenizer(kind)
    words = bad_words(known, ("little girl", "Lily", "day"))
    for text in ("a little girl", "Lily", "One day", "One\nday", "One,day"):
        *before, last = known.encode(text, bos=False)
        assert last in words.single | words.completing(before), text


def test_words_are_spelled_once_for_all_requests_that_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    known, calls, encode = tokenizer("tiny"), [], Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda *given, **options: calls.append(given) or encode(*given, **options))
    for _ in range(3):
        first = bad_words(known, ("one", "two of them"))
    assert len(calls) > 0
    spelled = len(calls)
    assert bad_words(known, ("one", "two of them")) is first
    assert len(calls) == spelled
    for number in range(40):
        bad_words(known, (f"word {number}",))
    assert bad_words(known, ("one", "two of them")) is not first, "those of long ago are not kept"


def test_words_that_are_spelled_alike_are_one() -> None:
    assert token_sequences(tokenizer("tiny"), ["the", " the", "the"]) == token_sequences(tokenizer("tiny"), ["the"])
    assert token_sequences(tokenizer("tiny"), []) == ()


def test_a_word_without_token_ids_is_refused_by_its_name() -> None:
    with pytest.raises(ValueError, match=r"^bad_words holds 'hm'; legal: strings to which pieces gives token ids$"):
        token_sequences(Pieces([b"a"]), ["hm"])
