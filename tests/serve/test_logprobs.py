"""Log-probabilities in both shapes: the spelling of tokens, finite values, and where tokens begin in the text."""

from __future__ import annotations

import json
import math
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastllama.io.tokenizer import load_tokenizer
from fastllama.runtime.outputs import TokenLogprob
from fastllama.serve.logprobs import ChatEntries, LogprobsTable
from tests.io.tokenizer_folders import folder

TOKENIZER = load_tokenizer(Path("fastllama/assets/tiny"))
FIRST_BYTE, SECOND_BYTE = TOKENIZER.encode("é", bos=False)[-2:]
BEYOND = TOKENIZER.vocab_size + 7  # of a model with more embeddings than its tokenizer has pieces
BYTE_TOKENS = [i for i in range(TOKENIZER.vocab_size) if len(TOKENIZER.token_bytes(i)) == 1]
# Parts of characters, whole ones, spaces, and what shows nothing, in any order.
TOKENS = st.sampled_from([1, 2, BEYOND, *TOKENIZER.encode(" a é 日 \U0001f600", bos=False)]) | st.sampled_from(
    BYTE_TOKENS
)


def reports(*token_ids: int) -> list[TokenLogprob]:
    return [TokenLogprob(token_id, -1.0) for token_id in token_ids]


def test_a_chat_spells_special_tokens_and_gives_the_bytes_of_parts_of_characters() -> None:
    token_ids = FIRST_BYTE, SECOND_BYTE, 2, BEYOND
    for skips, data in ((False, list(b"</s>")), (True, [])):
        entries = ChatEntries(TOKENIZER, skip_special_tokens=skips).of(reports(*token_ids)).content
        assert [entry.token for entry in entries] == ["\ufffd", "\ufffd", "</s>", ""]
        assert [entry.bytes for entry in entries] == [[0xC3], [0xA9], data, []]


@given(st.lists(TOKENS, max_size=8), st.integers(0, 9), st.booleans())
def test_a_chat_s_bytes_join_to_its_text(token_ids: list[int], cut: int, skips: bool) -> None:
    made = ChatEntries(TOKENIZER, skip_special_tokens=skips)
    entries = [each for part in (token_ids[:cut], token_ids[cut:]) for each in made.of(reports(*part)).content]
    text = TOKENIZER.decode([i for i in token_ids if i != BEYOND], skip_special_tokens=skips)
    assert b"".join(bytes(entry.bytes) for entry in entries).decode("utf-8", "replace") == text


def test_the_space_that_a_chat_s_text_begins_without_is_none_of_its_first_token_s() -> None:
    letter = TOKENIZER.encode(" a", bos=False)[-1]
    report = TokenLogprob(letter, -1.0, ((letter, -1.0),))
    first, second = ChatEntries(TOKENIZER).of([report, report]).content
    assert (first.token, first.bytes) == ("a", list(b"a"))
    assert (second.token, second.bytes) == (" a", list(b" a"))
    assert [top.token for top in first.top_logprobs] == [" a"], "the sampled token, as it is spelled"
    assert ChatEntries(TOKENIZER, begun=True).of([report]).content[0].token == " a"
    assert ChatEntries(load_tokenizer(folder("llama3"))).of(reports(220)).content[0].token == " "
    _, first = ChatEntries(TOKENIZER).of(reports(2, letter)).content
    assert (first.token, first.bytes) == ("a", list(b"a")), "after a token without text"


def test_a_chat_lists_the_likeliest_tokens_best_first() -> None:
    (entry,) = ChatEntries(TOKENIZER).of([TokenLogprob(FIRST_BYTE, -3.0, ((2, -0.5), (SECOND_BYTE, -1.0)))]).content
    assert [(top.token, top.logprob, top.bytes) for top in entry.top_logprobs] == [
        ("</s>", -0.5, list(b"</s>")),
        ("\ufffd", -1.0, [0xA9]),
    ]


def test_no_number_is_infinite() -> None:
    never = TokenLogprob(5, -math.inf, ((6, -math.inf),))
    for shape in (ChatEntries(TOKENIZER).of([never]), LogprobsTable(TOKENIZER).of([5], [never])):
        assert json.loads(msgspec.json.encode(shape)) == msgspec.to_builtins(shape)
        assert b"-9999.0" in msgspec.json.encode(shape)
        assert b"null" not in msgspec.json.encode(shape).replace(b'"refusal":null', b"")


def test_of_two_tokens_with_one_text_the_better_is_listed() -> None:
    report = TokenLogprob(SECOND_BYTE, -4.0, ((FIRST_BYTE, -1.0), (2, -2.0)))
    assert LogprobsTable(TOKENIZER).of([SECOND_BYTE], [report]).top_logprobs == [{"\ufffd": -1.0, "</s>": -2.0}]


def test_the_actual_token_is_listed_beside_the_likeliest() -> None:
    report = TokenLogprob(2, -4.0, ((FIRST_BYTE, -1.0),))
    assert LogprobsTable(TOKENIZER).of([2], [report]).top_logprobs == [{"\ufffd": -1.0, "</s>": -4.0}]


def test_without_a_number_of_likeliest_tokens_their_column_is_null() -> None:
    assert LogprobsTable(TOKENIZER, shows_top=False).of([2], reports(2)).top_logprobs is None


def shown(token_ids: list[int]) -> bytes:
    """The text of tokens, without the leading space."""
    return b"".join(TOKENIZER.token_bytes(i) for i in token_ids if i != BEYOND).removeprefix(b" ")


@given(st.lists(TOKENS, max_size=4), st.lists(TOKENS, max_size=8), st.integers(0, 9))
def test_a_token_begins_with_the_character_that_its_first_byte_is_part_of(
    before: list[int], token_ids: list[int], cut: int
) -> None:
    table = LogprobsTable(TOKENIZER, before, offset=100)
    found = [
        offset for part in (token_ids[:cut], token_ids[cut:]) for offset in table.of(part, reports(*part)).text_offset
    ]
    begin = len(shown(before).decode("utf-8", "replace"))
    for place, offset in enumerate(found):
        ahead, data = shown([*before, *token_ids[:place]]), shown([*before, *token_ids[: place + 1]])
        with_it = data[: len(ahead) + 1]  # one byte of it, if it has one
        expected = len(with_it.decode("utf-8", "replace")) - (len(with_it) > len(ahead))
        assert offset == 100 + max(0, expected - begin), "or with the answer, where that goes on within a character"


@given(st.text(max_size=30), st.text(max_size=30))
def test_the_tokens_of_a_valid_text_begin_where_the_text_before_them_ends(prompt: str, text: str) -> None:
    before, token_ids = TOKENIZER.encode(prompt), TOKENIZER.encode(text, bos=False)
    found = LogprobsTable(TOKENIZER, before).of(token_ids, reports(*token_ids)).text_offset
    ahead = [shown([*before, *token_ids[:place]]) for place in range(len(token_ids))]
    begin = len(shown(before).decode())
    assert found == [len(data.decode("utf-8", "ignore")) - begin for data in ahead]


def test_broken_bytes_are_characters_too() -> None:
    part, letter = TOKENIZER.encode("\U0001f600", bos=False)[1], TOKENIZER.encode(" m", bos=False)[-1]
    assert TOKENIZER.token_bytes(part) == b"\xf0"
    for token_ids, offsets in (
        ([letter, part, letter, part], [0, 2, 3, 5]),
        ([part] * 4, [0, 1, 2, 3]),
        ([part, FIRST_BYTE, SECOND_BYTE, part, 2], [0, 1, 1, 2, 3]),
        ([SECOND_BYTE, SECOND_BYTE, letter], [0, 1, 2]),
    ):
        assert LogprobsTable(TOKENIZER, [1, 5]).of(token_ids, reports(*token_ids)).text_offset == offsets


def test_offsets_pass_over_what_is_not_shown() -> None:
    token_ids = [1, *TOKENIZER.encode("é a", bos=False), 2, BEYOND]
    columns = LogprobsTable(TOKENIZER).of(token_ids, reports(*token_ids))
    assert columns.tokens == ["<s>", " ", "\ufffd", "\ufffd", " a", "</s>", ""]
    assert columns.text_offset == [0, 0, 0, 0, 1, 3, 3]
    shown = LogprobsTable(TOKENIZER, skip_special_tokens=False).of([5, 2, 2], reports(5, 2, 2))
    assert shown.text_offset[1:] == [shown.text_offset[1], shown.text_offset[1] + len("</s>")]


def test_a_prompt_may_end_with_an_id_without_a_piece() -> None:
    assert LogprobsTable(TOKENIZER, [1, BEYOND]).of([5], reports(5)).text_offset == [0]


def test_reports_and_tokens_are_of_one_number() -> None:
    with pytest.raises(ValueError, match="zip"):
        LogprobsTable(TOKENIZER).of([1, 2], reports(1))
