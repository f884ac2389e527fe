"""Whole tokenizer folders match transformers: ids, text, streamed text, special tokens, chat template."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastllama.io.detokenizer import IncrementalDetokenizer
from fastllama.io.tokenizer import Tokenizer, load_tokenizer
from fastllama.io.tokenizer.sentencepiece_model import SentencePieceTokenizer
from tests.io import tokenizer_folders as folders

CONTROL = ("<s>", "</s>", "<unk>")
TAGS = [
    "<|im_start|>",
    "<|im_end|>",
    "[PAD]",
    "<pad>",
    "<x>",
    "<think>",
    "<|eot_id|>",
    "<|begin_of_text|>",
    "<l>",
    "<r>",
]
TAGS += ["cat", "catalogue", "<lr>", "fox", "<|endoftext|>", "<|reserved_special_token_7|>", "<|im_start|>user\n"]
PARTS = [
    " ",
    "\n",
    "  ",
    "\t",
    "é",
    "😀",
    "㐂",
    "a",
    "word",
    "<",
    "|>",
    "`",
    "\u0301",
    "_",
    "the théâtre",
    "\x00",
    "\u200d",
    "²",
]
TEXT = st.lists(st.sampled_from([*TAGS, *PARTS]), max_size=8).map("".join)
TEMPLATE = st.lists(st.sampled_from([*TAGS, *PARTS, *CONTROL]), max_size=8).map("".join)
fewer = settings(deadline=None, max_examples=60)


@pytest.fixture(scope="module", params=folders.names())
def name(request) -> str:
    return request.param


@functools.cache
def ours(name: str) -> Tokenizer:
    return load_tokenizer(folders.folder(name))


@functools.cache
def theirs(name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folders.folder(name))


AROUND = ["{}", "a{}b", " {} ", "a {} b", "a  {}  b", "{0}{0}", "{0} {0}", "\n{}\n", "_{}", "{}é"]


def test_added_tokens_between_all_possible_neighbours(name):
    texts = [around.format(tag) for tag in [*TAGS, *CONTROL] for around in AROUND]
    expected = theirs(name)(texts, add_special_tokens=False).input_ids
    assert [ours(name).encode_template(text) for text in texts] == expected
    for text, ids in zip(texts, expected, strict=True):
        if not any(piece in text for piece in CONTROL) and not (ours(name).adds_leading_space and text[0] == " "):
            assert ours(name).encode(text, bos=False) == ids


@fewer
@given(text=TEXT)
@example(text="")
def test_encode_is_that_of_transformers(name, text):
    text = text.lstrip(" ") if ours(name).adds_leading_space else text  # spaces that transformers swallows
    assert ours(name).encode(text) == theirs(name)(text).input_ids
    assert ours(name).encode(text, bos=False) == theirs(name)(text, add_special_tokens=False).input_ids


@fewer
@given(text=TEMPLATE)
def test_a_rendered_template_becomes_the_ids_of_transformers(name, text):
    assert ours(name).encode_template(text) == theirs(name)(text, add_special_tokens=False).input_ids


@fewer
@given(text=TEMPLATE, skip=st.booleans(), cut=st.integers(0, 20))
def test_decoding_and_streaming_are_that_of_transformers(name, text, skip, cut):
    ids = theirs(name)(text).input_ids
    expected = theirs(name).decode(ids, skip_special_tokens=skip)
    assert ours(name).decode(ids, skip_special_tokens=skip) == expected
    stream = IncrementalDetokenizer(ours(name), ids[:cut], skip_special_tokens=skip)
    streamed = "".join([*map(stream.push, ids[cut:]), stream.flush()])
    assert streamed == expected[len(ours(name).decode(ids[:cut], skip_special_tokens=skip)) :]


def test_the_vocabulary_is_that_of_transformers(name):
    mine, reference = ours(name), theirs(name)
    pieces = {piece: i for piece, i in reference.get_vocab().items() if piece != "<FILL_ME>"}  # no token here
    assert {mine.id_to_piece(i): i for i in range(mine.vocab_size)} == pieces
    assert dict(mine.special_tokens) == {k: v for k, v in reference.special_tokens_map.items() if k != "fill_token"}
    assert (mine.bos_token_id, mine.eos_token_id) == (reference.bos_token_id, reference.eos_token_id)
    assert mine.pad_token_id == reference.pad_token_id
    assert mine.chat_template == reference.chat_template
    assert mine.special_ids == {
        i for i, token in reference.added_tokens_decoder.items() if token.special and i < mine.vocab_size
    } | {i for i in [reference.unk_token_id] if i is not None}


def test_control_pieces_of_sentencepiece_in_plain_text_are_text(name):
    if ours(name).adds_leading_space and name != "unigram_json":  # Unigram makes pieces of whatever spells them
        for piece in CONTROL:
            ids = ours(name).encode(f"a{piece}b", bos=False)
            assert not {0, 1, 2} & set(ids)
            assert ours(name).decode(ids) == f"a{piece}b"


REPEATED = st.lists(st.tuples(st.sampled_from([*TAGS, *PARTS, *CONTROL]), st.sampled_from([1, 3, 40])), max_size=5)


@given(pieces=REPEATED)
@fewer
def test_no_text_has_fewer_tokens_than_it_has_at_the_least(name: str, pieces: list[tuple[str, int]]) -> None:
    tokenizer, text = ours(name), "".join(piece * count for piece, count in pieces)
    least = tokenizer.least_length(text)
    assert 0 <= least <= min(len(tokenizer.encode(text)), len(tokenizer.encode_template(text)))


def test_blanks_count_unless_something_may_drop_them() -> None:
    found = {name: ours(name).least_length(" " * 10000) for name in folders.names()}
    sentencepiece = {name for name in found if isinstance(ours(name), SentencePieceTokenizer)}
    stripping = {"every_flag", "chatml_decoder"}  # added tokens that take the white space beside them
    assert {name for name, least in found.items() if least} == sentencepiece - stripping


def test_most_tokenizers_know_a_least_length() -> None:
    text = "once upon a time " * 1000
    found = {name: ours(name).least_length(text) for name in folders.names()}
    assert {name for name, least in found.items() if least == 0} == {"unigram_json"}, "whose unknown token may be long"
