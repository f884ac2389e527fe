"""tools.words reads prose, skips names, and knows meanings that the field shares."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import words


def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> list[tuple[int, str]]:
    monkeypatch.setattr(words, "ROOT", tmp_path)
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return sorted((hit.line, hit.text) for hit in words.hits(path))


def test_docstrings_comments_and_messages_are_prose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = '"""Kept for nobody."""\ncodes = 1  # guesses of a draft\nraise ValueError(f"the file says {codes}")\n'
    lines = [(1, "Kept for nobody."), (2, "# guesses of a draft"), (3, "the file says")]
    assert found(tmp_path, monkeypatch, "a.py", text) == lines


def test_strings_of_a_test_are_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = '"""Kept for nobody."""\nx = "what the file says"\n'
    assert found(tmp_path, monkeypatch, "tests/a.py", text) == [(1, "Kept for nobody.")]


def test_names_in_backticks_and_code_blocks_are_not_prose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "`codes` [N, K]\n```python\ncodes = told\n```\nSee [this](codes.md).\nA product.\n"
    assert found(tmp_path, monkeypatch, "a.md", text) == [(6, "A product.")]


@pytest.mark.parametrize("fine", ["Dot products in fp32.", "The exit code is 1.", "The plot is drawn anew.", "tokens"])
def test_a_meaning_that_the_field_shares_is_not_counted(
    fine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert found(tmp_path, monkeypatch, "a.md", fine) == []


def test_each_word_of_the_glossary_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [
        "products",
        "code",
        "somebody's",
        "told",
        "guessed",
        "came true",
        "drawn",
        "around",
        "in front",
        "behind",
    ]
    for sample in [*samples, "the same bits", "in any company"]:
        assert found(tmp_path, monkeypatch, "a.md", sample) == [(1, sample)]
    assert len(samples) + 2 == len(words.GLOSSARY)
