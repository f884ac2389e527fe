"""as_tokenizer: a tokenizer of transformers becomes ours by its own files, with equal ids, or is not used."""

from __future__ import annotations

import copy
import logging
import tempfile
from pathlib import Path
from typing import Any

import pytest
import transformers
from packaging.version import Version
from transformers import AddedToken, AutoTokenizer

from fastllama.errors import ExtraRequiredError
from fastllama.io.tokenizer import HFTokenizer, SentencePieceTokenizer, Tokenizer, as_tokenizer, load_tokenizer
from tests.io import tokenizer_folders as folders
from tests.io import tokenizer_samples as samples

BEFORE_5 = Version(transformers.__version__) < Version("5")
# Kinds that every version of transformers reads, and writes so that they are read alike.
KINDS = ["llama2_slow", "llama2_json_of_its_own", "smollm2", "llama3", "llama3_called_llama"]
TEXTS = ["", "Once upon a time", "a  b\n\n c\t", "x = [1, 22, 333]  # naïve 😀 日本", "he said: “no”…\r\n", "1999 ²"]


def opened(kind: str) -> Any:
    return AutoTokenizer.from_pretrained(folders.folder(kind))


class Changed:
    """A tokenizer by another library's class: what it delegates to, but for one text."""

    def __init__(self, inner: Any, text: str | None = None) -> None:
        self._inner, self._text = inner, text

    def save_pretrained(self, folder: str) -> None:
        self._inner.save_pretrained(folder)

    def __call__(self, text: str, **options: Any) -> Any:
        ids = self._inner(text, **options)["input_ids"]
        return {"input_ids": [*ids, 5] if text == self._text else ids}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_are_those_of_transformers(kind: str) -> None:
    theirs = opened(kind)
    ours = as_tokenizer(theirs)
    assert ours is not None
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_its_files_are_read_as(kind: str, tmp_path: Path) -> None:
    theirs = opened(kind)
    theirs.save_pretrained(tmp_path)
    ours, of_files = as_tokenizer(theirs), load_tokenizer(tmp_path)
    assert ours is not None
    assert type(ours) is type(of_files)
    assert ours.chat_template == of_files.chat_template
    assert ours.special_tokens == of_files.special_tokens
    assert [ours.id_to_piece(i) for i in range(300)] == [of_files.id_to_piece(i) for i in range(300)]


def test_a_slow_tokenizer() -> None:
    """transformers 5 has none of Llama's."""
    theirs = transformers.LlamaTokenizer.from_pretrained(folders.folder("llama2_slow"))
    ours = as_tokenizer(theirs)
    assert isinstance(ours, SentencePieceTokenizer if BEFORE_5 else HFTokenizer)
    assert [ours.encode(text) for text in TEXTS] == [theirs(text)["input_ids"] for text in TEXTS]


def test_the_chat_template_comes_along() -> None:
    theirs = opened("smollm2")
    theirs.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    ours = as_tokenizer(theirs)
    assert ours is not None
    assert ours.chat_template == theirs.chat_template


def test_tokens_that_were_added_and_settings_that_were_made_in_memory() -> None:
    theirs = opened("smollm2")
    added = [AddedToken("<|tool|>", special=True, normalized=False), "wizardry"]
    assert theirs.add_tokens(added) == 2
    ours = as_tokenizer(theirs)
    assert ours is not None
    text = "Once<|tool|> wizardry upon wizardrya<|im_start|>"
    assert theirs.convert_tokens_to_ids(["<|tool|>", "wizardry"]) == [len(theirs) - 2, len(theirs) - 1]
    assert ours.encode_template(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert {len(theirs) - 2, len(theirs) - 1} < {*ours.encode_template(text)}


def test_any_object_that_writes_and_encodes() -> None:
    theirs = opened("smollm2")
    ours = as_tokenizer(Changed(theirs))
    assert ours is not None
    assert ours.encode("Once upon") == theirs("Once upon")["input_ids"]
    assert ours.path == Path("Changed", "tokenizer.json")


def test_messages_name_it_as_transformers_does() -> None:
    theirs = opened("smollm2")
    ours = as_tokenizer(theirs)
    assert ours is not None
    assert ours.path == folders.folder("smollm2") / "tokenizer.json"
    theirs.name_or_path = "org/name"
    ours = as_tokenizer(theirs)
    assert ours is not None
    with pytest.raises(ValueError, match=r"^token id 99999 is not in org/name/tokenizer.json; legal: 0 to"):
        ours.id_to_piece(99999)
    theirs.name_or_path = ""
    again = as_tokenizer(theirs)
    assert again is not None
    assert again.path == Path(type(theirs).__name__, "tokenizer.json")


@pytest.mark.parametrize("text", ["", "a", "\x07\ufffd\U0010ffff"])
def test_one_text_that_differs_is_enough_and_is_named(text: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert as_tokenizer(Changed(opened("smollm2"), text)) is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    message = record.getMessage()
    assert message.startswith("tokenizer Changed is not used, only token ids go in and out: of the text ")
    assert ascii(text)[1:3] in ascii(message)
    assert "5], ours [" in message


class Framed(Changed):
    """Puts a token after each text, which its files do not describe."""

    def __call__(self, text: str, **options: Any) -> Any:
        ids = super().__call__(text, **options)["input_ids"]
        return {"input_ids": ids if options.get("add_special_tokens") is False else [*ids, 2]}


def test_what_is_added_before_and_after_a_text_is_compared_too(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert as_tokenizer(Framed(opened("smollm2"))) is None
    assert "of the text '' it makes [2], ours []" in caplog.text


def test_added_tokens_are_compared_too(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert as_tokenizer(Changed(opened("smollm2"), "a <|im_end|> b<|im_end|>c\n")) is None
    assert "of the text 'a <|im_end|> b<|im_end|>c\\n' it makes [" in caplog.text


def test_files_that_are_not_read_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    theirs = opened("smollm2")
    theirs.eos_token = None
    theirs.name_or_path = "org/name"
    with caplog.at_level(logging.WARNING):
        assert as_tokenizer(theirs) is None
    (record,) = caplog.records
    start = "tokenizer org/name is not used, only token ids go in and out: tokenizer.json holds no EOS piece"
    assert record.getMessage().startswith(start)
    assert tempfile.gettempdir() not in record.getMessage()


class Bare:
    """A tokenizer that writes no tokenizer file of a Llama."""

    def save_pretrained(self, folder: str) -> None:
        Path(folder, "vocab.txt").write_text("[UNK]\n")

    def __call__(self, text: str, **options: Any) -> Any:
        return {"input_ids": []}


def test_a_foreign_tokenizer_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert as_tokenizer(Bare()) is None
    assert "tokenizer Bare is not used, only token ids go in and out: no tokenizer in its files" in caplog.text


def test_a_missing_package_is_reported(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: Path) -> Tokenizer:
        raise ExtraRequiredError(f"reading {path}", "no_such_package", "hf")

    monkeypatch.setattr("fastllama.io.tokenizer.conversion.load_tokenizer", missing)
    with caplog.at_level(logging.WARNING):
        assert as_tokenizer(opened("smollm2")) is None
    assert "pip install 'fastllama[hf]'" in caplog.text


def test_nothing_is_left_in_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = opened("smollm2")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ours = as_tokenizer(theirs)
    assert list(tmp_path.iterdir()) == []
    assert ours is not None
    assert ours.encode("<s> and </s>")  # which is read again where such pieces are spelled
    assert copy.deepcopy(ours).encode("Once") == ours.encode("Once")


def test_ours_and_paths() -> None:
    ours = samples.tokenizer("tiny")
    assert as_tokenizer(ours) is ours
    found = as_tokenizer(samples.TINY)
    assert found is not None
    assert found.encode("Once") == ours.encode("Once")
    with pytest.raises(FileNotFoundError, match="no tokenizer at no/such"):
        as_tokenizer("no/such")


@pytest.mark.parametrize("value", [3, None, {"input_ids": []}, len, Bare], ids=repr)
def test_what_is_no_tokenizer(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^tokenizer is .*; legal: a path, fastllama's Tokenizer, a transformers tok"):
        as_tokenizer(value)
