"""Streaming text equals decoding at once, and never shows a part of a character."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllama.io.detokenizer import IncrementalDetokenizer
from fastllama.io.tokenizer import Tokenizer
from tests.io import tokenizer_samples as samples

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁\ufffd"), min_size=1)
EMOJI = [byte + 3 for byte in "😀".encode()]  # Llama's byte pieces are 3 to 258
SURROGATE = [3 + 0xED, 3 + 0xA0]
BYTES = st.sampled_from([EMOJI, EMOJI[:1], EMOJI[:2], EMOJI[2:], SURROGATE]) | st.integers(3, 258).map(lambda i: [i])
ANY = st.integers(0, 10**9).map(lambda i: [i]) | st.integers(0, 2).map(lambda i: [i])
IDS = st.lists(BYTES | ANY, max_size=8).map(lambda parts: [i for part in parts for i in part])
fewer = settings(deadline=None, max_examples=100)


@pytest.fixture(scope="module", params=["tiny", "tiny-metaspace", "llama2"])
def tokenizer(request) -> Tokenizer:
    return samples.tokenizer(request.param)


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    return samples.tokenizer("tiny")


def pieces(detokenizer: IncrementalDetokenizer, ids: list[int]) -> list[str]:
    return [*map(detokenizer.push, ids), detokenizer.flush()]


@fewer
@given(prompt=IDS, generated=IDS, skip=st.booleans())
def test_pieces_join_to_what_decoding_adds_to_the_prompt(tokenizer, prompt, generated, skip):
    prompt = [i % tokenizer.vocab_size for i in prompt]
    generated = [i % tokenizer.vocab_size for i in generated]
    before = tokenizer.decode(prompt, skip_special_tokens=skip)
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, skip_special_tokens=skip)
    joined = "".join(pieces(detokenizer, generated))
    assert joined == tokenizer.decode(prompt + generated, skip_special_tokens=skip)[len(before) :]
    assert detokenizer.text == joined


@fewer
@given(prompt=TEXT, text=TEXT)
def test_valid_text_never_shows_a_broken_character(tokenizer, prompt, text):
    ids = tokenizer.encode(prompt + text)
    whole = [n for n in range(len(ids) + 1) if "\ufffd" not in tokenizer.decode(ids[:n])]
    cut = whole[len(whole) // 2]
    detokenizer = IncrementalDetokenizer(tokenizer, ids[:cut])
    emitted = pieces(detokenizer, ids[cut:])
    assert "\ufffd" not in "".join(emitted)
    assert tokenizer.decode(ids[:cut]) + "".join(emitted) == prompt + text


def test_bytes_of_a_character_come_out_together(tiny):
    detokenizer = IncrementalDetokenizer(tiny, [tiny.bos_token_id])
    assert pieces(detokenizer, EMOJI * 2) == ["", "", "", "😀"] * 2 + [""]


def test_an_invalid_sequence_is_marked_as_soon_as_it_cannot_become_valid(tiny):
    first, second, *_ = EMOJI
    a = 3 + ord("a")
    assert pieces(IncrementalDetokenizer(tiny, []), [first, second, a]) == ["", "", "\ufffda", ""]
    assert pieces(IncrementalDetokenizer(tiny, []), [first, first]) == ["", "\ufffd", "\ufffd"]
    assert pieces(IncrementalDetokenizer(tiny, []), [3 + 0x80, a]) == ["\ufffd", "a", ""]
    assert pieces(IncrementalDetokenizer(tiny, []), [*SURROGATE, a]) == ["", "", "\ufffd\ufffda", ""]
    assert pieces(IncrementalDetokenizer(tiny, []), [first, second]) == ["", "", "\ufffd"]


def test_the_first_word_keeps_its_space_only_after_text(tokenizer):
    prompt, word = tokenizer.encode("a"), tokenizer.encode("b", bos=False)
    assert pieces(IncrementalDetokenizer(tokenizer, prompt), word)[0] == " b"
    for nothing in ([], [tokenizer.bos_token_id]):
        assert pieces(IncrementalDetokenizer(tokenizer, nothing), word)[0] == "b"
    shown = IncrementalDetokenizer(tokenizer, [tokenizer.bos_token_id], skip_special_tokens=False)
    assert pieces(shown, word)[0] == " b"


def test_special_ids_are_skipped_or_shown(tokenizer):
    ids = [*tokenizer.encode("b", bos=False), tokenizer.eos_token_id]
    prompt = tokenizer.encode("a")
    assert pieces(IncrementalDetokenizer(tokenizer, prompt), ids) == [" b", "", ""]
    assert pieces(IncrementalDetokenizer(tokenizer, prompt, skip_special_tokens=False), ids) == [" b", "</s>", ""]


def test_a_prompt_that_ends_inside_a_character(tiny):
    assert tiny.decode(EMOJI[:2]) == "\ufffd"
    assert pieces(IncrementalDetokenizer(tiny, EMOJI[:2]), [*EMOJI[2:], 3 + ord("a")]) == ["", "", "a", ""]
    assert pieces(IncrementalDetokenizer(tiny, EMOJI[:2]), [3 + ord("a")]) == ["a", ""]
    assert pieces(IncrementalDetokenizer(tiny, EMOJI[:2]), []) == [""]
    assert tiny.decode(SURROGATE) == "\ufffd\ufffd"
    assert pieces(IncrementalDetokenizer(tiny, SURROGATE), [3 + ord("a")]) == ["a", ""]


def test_flush_ends_the_character_and_can_be_repeated(tiny):
    detokenizer = IncrementalDetokenizer(tiny, [])
    detokenizer.push(EMOJI[0])
    assert [detokenizer.flush(), detokenizer.flush(), detokenizer.push(3 + ord("a"))] == ["\ufffd", "", "a"]
    assert detokenizer.text == "\ufffda"


def test_each_push_looks_at_one_id(tiny):
    watched = Mock(wraps=tiny, adds_leading_space=tiny.adds_leading_space)
    detokenizer = IncrementalDetokenizer(watched, tiny.encode("a long prompt"))
    watched.reset_mock()
    for token_id in EMOJI * 100:
        detokenizer.push(token_id)
    assert [call[0] for call in watched.mock_calls] == ["token_bytes"] * 400


def test_an_id_out_of_range_is_refused(tiny):
    with pytest.raises(ValueError, match=rf"^token id {tiny.vocab_size} is not in "):
        IncrementalDetokenizer(tiny, []).push(tiny.vocab_size)


@fewer
@given(prompt=IDS, shared=IDS, tails=st.tuples(IDS, IDS), skips=st.tuples(st.booleans(), st.booleans()))
def test_a_fork_goes_on_from_the_same_place_by_itself(tokenizer, prompt, shared, tails, skips):
    one, two, *rest = [[i % tokenizer.vocab_size for i in ids] for ids in (*tails, prompt, shared)]
    detokenizer = IncrementalDetokenizer(tokenizer, rest[0], skip_special_tokens=skips[0])
    for token_id in rest[1]:
        detokenizer.push(token_id)
    fork = detokenizer.fork(skip_special_tokens=skips[1])
    pieces(fork, two)
    pieces(detokenizer, one)
    for found, skip, tail in ((detokenizer, skips[0], one), (fork, skips[1], two)):
        alone = IncrementalDetokenizer(tokenizer, rest[0], skip_special_tokens=skips[0])
        for token_id in rest[1]:
            alone.push(token_id)
        alone._skip = skip
        pieces(alone, tail)
        assert found.text == alone.text
