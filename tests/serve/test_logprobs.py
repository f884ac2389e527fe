"""Log-probabilities in both shapes: what is spelled, what is finite, and where tokens begin in the text."""

from __future__ import annotations

import json
import math
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastllama.io.detokenizer import IncrementalDetokenizer
from fastllama.io.tokenizer import load_tokenizer
from fastllama.runtime.outputs import TokenLogprob
from fastllama.serve.logprobs import LogprobsTable, chat_logprobs

TOKENIZER = load_tokenizer(Path("fastllama/assets/tiny"))
FIRST_BYTE, SECOND_BYTE = TOKENIZER.encode("é", bos=False)[-2:]
BEYOND = TOKENIZER.vocab_size + 7  # of a model with more embeddings than its tokenizer has pieces


def reports(*token_ids: int) -> list[TokenLogprob]:
    return [TokenLogprob(token_id, -1.0) for token_id in token_ids]


def test_a_chat_spells_special_tokens_and_gives_the_bytes_of_parts_of_characters() -> None:
    entries = chat_logprobs(TOKENIZER, reports(FIRST_BYTE, SECOND_BYTE, 2, BEYOND)).content
    assert [entry.token for entry in entries] == ["\ufffd", "\ufffd", "</s>", ""]
    assert [entry.bytes for entry in entries] == [[0xC3], [0xA9], list(b"</s>"), []]


def test_a_chat_lists_the_likeliest_tokens_best_first() -> None:
    (entry,) = chat_logprobs(TOKENIZER, [TokenLogprob(FIRST_BYTE, -3.0, ((2, -0.5), (SECOND_BYTE, -1.0)))]).content
    assert [(top.token, top.logprob, top.bytes) for top in entry.top_logprobs] == [
        ("</s>", -0.5, list(b"</s>")),
        ("\ufffd", -1.0, [0xA9]),
    ]


def test_no_number_is_infinite() -> None:
    never = TokenLogprob(5, -math.inf, ((6, -math.inf),))
    for shape in (chat_logprobs(TOKENIZER, [never]), LogprobsTable(TOKENIZER).of([5], [never])):
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


@given(st.text(max_size=30), st.text(max_size=30), st.integers(0, 40))
def test_a_token_begins_where_the_text_before_it_ends(prompt: str, text: str, cut: int) -> None:
    before = TOKENIZER.encode(prompt)
    token_ids = TOKENIZER.encode(text, bos=False)
    table = LogprobsTable(TOKENIZER, before, offset=100)
    first = table.of(token_ids[:cut], reports(*token_ids[:cut]))
    second = table.of(token_ids[cut:], reports(*token_ids[cut:]))
    detokenizer, expected = IncrementalDetokenizer(TOKENIZER, before), []
    for token_id in token_ids:
        expected.append(100 + len(detokenizer.text))
        detokenizer.push(token_id)
    assert first.text_offset + second.text_offset == expected


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
