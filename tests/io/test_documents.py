"""Texts as documents of token ids: whole, line by line, cut into windows for quantizers, sampled evenly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastllama
from fastllama.io.documents import calibration_documents, text_documents
from fastllama.io.tokenizer import Tokenizer, load_tokenizer

TINY = Path(fastllama.__file__).parent / "assets" / "tiny"
TOKENIZER = load_tokenizer(TINY)
BOS, EOS = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id
STORY = "Once upon a time there was a little owl who lived in an old tree and liked to sing. " * 6


@pytest.fixture
def without_bos(tmp_path: Path) -> Tokenizer:
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    return load_tokenizer(tmp_path)


def test_a_text_is_one_document_or_one_a_line() -> None:
    text = "A cat.\n\n  \nThe cat sat.\n"
    assert text_documents(text, TOKENIZER) == [TOKENIZER.encode(text)]
    assert (TOKENIZER.encode(text)[0], TOKENIZER.encode(text).count(EOS)) == (BOS, 0)
    lines = [[BOS, *TOKENIZER.encode(line, bos=False), EOS] for line in ("A cat.", "The cat sat.")]
    assert text_documents(text, TOKENIZER, per_line=True) == lines
    for blank, lines_said in (
        ("\n  \n", "2 lines"),
        ("\r\n \r\n\r\n", "3 lines"),
        ("\n\n ", "3 lines"),
        ("", "0 lines"),
    ):
        with pytest.raises(ValueError, match=f"each of the text's {lines_said} is blank; legal: one that is not"):
            text_documents(blank, TOKENIZER, per_line=True)


def test_a_whole_text_does_not_end_in_eos_where_the_tokenizer_adds_one(tmp_path: Path) -> None:
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "add_eos_token": True}))
    adds = load_tokenizer(tmp_path)
    assert adds.encode("A cat.") == [*TOKENIZER.encode("A cat."), EOS]
    assert text_documents("A cat.", adds) == [TOKENIZER.encode("A cat.")]
    assert text_documents("A cat.", adds, per_line=True) == text_documents("A cat.", TOKENIZER, per_line=True)


@pytest.mark.parametrize("per_line", [False, True])
@pytest.mark.parametrize("newline", ["\r\n", "\r"])
def test_newlines_are_universal(newline: str, per_line: bool) -> None:
    text = "A cat.\n\nThe cat sat.\n"
    found = text_documents(text.replace("\n", newline), TOKENIZER, per_line=per_line)
    assert found == text_documents(text, TOKENIZER, per_line=per_line)


@pytest.mark.parametrize("inside", ["\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"])
def test_a_line_ends_at_newlines_only(inside: str) -> None:
    """str.splitlines would split at more characters."""
    line = f"A cat.{inside}The cat sat."
    (found,) = text_documents(line, TOKENIZER, per_line=True)
    assert found == [TOKENIZER.bos_token_id, *TOKENIZER.encode(line, bos=False), TOKENIZER.eos_token_id]


def cut(text: str, tokenizer: Tokenizer = TOKENIZER, context: int = 16, samples: int = 1000, **how: bool) -> list:
    return calibration_documents(text, tokenizer, per_line=False, context=context, samples=samples, **how)


@given(st.integers(2, 40), st.integers(1, 90))
def test_a_long_text_is_cut_into_windows_that_each_begin_with_bos(context: int, words: int) -> None:
    """Together they are the text, except for an end of less than half a window."""
    ids = TOKENIZER.encode(" ".join(STORY.split()[:words]))
    windows = cut(" ".join(STORY.split()[:words]), context=context)
    assert [window[0] for window in windows] == [BOS] * len(windows)
    assert all(len(window) == context for window in windows[:-1])
    assert len(windows[-1]) <= context
    text = [token for window in windows for token in window[1:]]
    assert text == ids[1 : 1 + len(text)]
    left = len(ids) - 1 - len(text)
    assert 2 * left < context - 1
    assert 2 * (len(windows[-1]) - 1) >= context - 1 or len(windows) == 1


def test_a_tokenizer_without_bos_has_windows_without(without_bos: Tokenizer) -> None:
    ids = without_bos.encode(STORY)
    assert ids[0] != BOS
    windows = cut(STORY, without_bos)
    assert windows[:3] == [ids[:16], ids[16:32], ids[32:48]]


def test_each_line_is_cut_by_itself_and_ends_with_eos() -> None:
    text = f"A cat.\n{STORY}\n"
    short, *windows = calibration_documents(text, TOKENIZER, per_line=True, context=16, samples=1000)
    assert short == [BOS, *TOKENIZER.encode("A cat.", bos=False), EOS]
    line = [*TOKENIZER.encode(STORY, bos=False), EOS]
    assert windows[0] == [BOS, *line[:15]]
    assert windows[1] == [BOS, *line[15:30]]


@given(st.integers(1, 60), st.integers(1, 60))
def test_samples_are_evenly_spaced_from_start_to_end(lines: int, samples: int) -> None:
    text = "".join(f"{number}\n" for number in range(lines))
    everything = text_documents(text, TOKENIZER, per_line=True)
    found = calibration_documents(text, TOKENIZER, per_line=True, context=16, samples=samples)
    assert len(found) == min(samples, lines)
    places = [everything.index(ids) for ids in found]
    count = len(found)
    offsets = [(2 * place + 1) * count - (2 * number + 1) * lines for number, place in enumerate(places)]
    assert all(abs(each) <= count for each in offsets), "one is not in the middle of its share of the lines"
    assert found == calibration_documents(text, TOKENIZER, per_line=True, context=16, samples=samples)


def test_a_blank_text_is_refused(without_bos: Tokenizer) -> None:
    for tokenizer in (TOKENIZER, without_bos):
        for blank in ("", "\n", " \n\t\n\n"):
            with pytest.raises(ValueError, match=r"^the text is blank; legal: one that is not$"):
                cut(blank, tokenizer)
    with pytest.raises(ValueError, match="context is 1; legal: at least 2"):
        cut(STORY, context=1)
    with pytest.raises(ValueError, match="samples is 0; legal: at least 1"):
        cut(STORY, samples=0)
