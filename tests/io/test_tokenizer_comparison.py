"""as_tokenizer compares a transformers tokenizer with its files, and reports changes made in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import decoders
from transformers import AutoTokenizer

from fastllama.io.hub import resolve_model
from fastllama.io.tokenizer import SentencePieceTokenizer, as_tokenizer
from tests.io import tokenizer_folders as folders
from tests.io.test_tokenizer_from_transformers import BEFORE_5, TEXTS, Changed, opened

LEGACY = ["a </s> b</s>c\n", "<s> [INST] Hi [/INST] Yo </s><s>x"]


def tiny(**options: Any) -> Any:
    """The bundled model's, a "legacy" SentencePiece vocabulary: transformers reads other ids out of what it writes."""
    return AutoTokenizer.from_pretrained(resolve_model("tiny"), **options)


def without_bos() -> Any:
    return tiny(add_bos_token=False)


def with_eos() -> Any:
    theirs = tiny()
    theirs.add_eos_token = True
    return theirs


def with_a_token() -> Any:
    theirs = tiny()
    assert theirs.add_tokens(["<|new|>"]) == 1
    return theirs


def with_a_template() -> Any:
    theirs = tiny()
    theirs.chat_template = "{{ bos_token }}{{ messages[0].content }}"
    return theirs


def with_templates() -> Any:
    theirs = tiny()
    theirs.chat_template = {"default": "{{ messages[0].content }}", "tools": "{{ tools }}"}
    return theirs


def of_nowhere() -> Any:
    theirs = tiny()
    theirs.name_or_path = "org/name"
    return theirs


def with_another_bos() -> Any:
    theirs = tiny()
    theirs.bos_token = "</s>"
    return theirs


def with_another_eos() -> Any:
    theirs = tiny()
    theirs.eos_token = "<unk>"
    return theirs


CHANGES = [tiny, without_bos, with_eos, with_a_token, with_a_template, with_templates, of_nowhere]
CHANGES += [with_another_bos, with_another_eos]


@pytest.mark.parametrize("changed", CHANGES, ids=lambda changed: changed.__name__)
def test_a_legacy_tokenizer_is_what_it_is_in_memory(
    changed: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    theirs = changed()
    ours = as_tokenizer(theirs)
    assert ours is not None
    assert not [record for record in caplog.records if record.name == "fastllama"]
    for text in [*LEGACY, *TEXTS, "a <|new|> b<|new|>c"]:
        assert ours.encode_template(text) == theirs(text, add_special_tokens=False)["input_ids"]
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"]
    template = theirs.chat_template
    assert ours.chat_template == (template["default"] if isinstance(template, dict) else template)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.special_tokens == theirs.special_tokens_map
    assert str(ours.path.parent) == theirs.name_or_path


@pytest.mark.parametrize("kind", folders.names())
def test_every_kind_of_folder_that_transformers_opens_and_writes(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    try:
        theirs = opened(kind)
    except (ValueError, TypeError, AttributeError) as error:
        if not BEFORE_5:
            raise
        pytest.skip(f"4.57 does not open it: {error}")
    ours = as_tokenizer(theirs)
    assert ours is not None
    assert not [record for record in caplog.records if record.name == "fastllama"]


class BehindControl(Changed):
    """Puts a space between a control piece and the text after it, or spells the piece."""

    chat_template = "x"

    def __init__(self, inner: Any, pieces: tuple[str, ...], *, spelled: bool = False) -> None:
        super().__init__(inner)
        self._pieces, self._spelled = pieces, spelled

    def __call__(self, text: str, **options: Any) -> Any:
        for piece in self._pieces:
            text = text.replace(piece, piece[:-1] if self._spelled else f"{piece} ")
        return super().__call__(text, **options)


def test_text_after_a_control_piece_may_differ_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    theirs = BehindControl(with_a_template(), ("</s>", "<s>"))
    ours = as_tokenizer(theirs)
    assert ours is not None
    assert [ours.encode(text) for text in TEXTS] == [theirs(text)["input_ids"] for text in TEXTS]
    (record,) = [record for record in caplog.records if record.name == "fastllama"]
    start = "tokenizer BehindControl is used, but text after a control piece is encoded differently: of the text "
    assert record.getMessage().startswith(start + "'a </s> b</s>c\\n' it makes [261, ")
    assert ", ours [261, " in record.getMessage()


@pytest.mark.parametrize("pieces", [("</s>", "<|new|>"), ("<|new|>", "<unk>")], ids=str)
def test_text_after_another_added_piece_may_not_differ(
    pieces: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    theirs = BehindControl(with_a_token(), pieces)
    theirs.added_tokens_encoder = {"<|new|>": 0}  # type: ignore[attr-defined]
    assert as_tokenizer(theirs) is None
    assert "only token ids go in and out: of the text 'a <|new|> b<|new|>c\\n' it makes" in caplog.text


def test_a_control_piece_itself_may_not_differ(caplog: pytest.LogCaptureFixture) -> None:
    assert as_tokenizer(BehindControl(tiny(), ("</s>",), spelled=True)) is None
    assert "only token ids go in and out: of the text 'a </s> b</s>c\\n' it makes" in caplog.text


@pytest.mark.skipif(not BEFORE_5, reason="transformers 5 has no slow tokenizer of Llama")
def test_a_slow_legacy_tokenizer(caplog: pytest.LogCaptureFixture) -> None:
    theirs = tiny(use_fast=False, legacy=True)
    ours = as_tokenizer(theirs)
    assert isinstance(ours, SentencePieceTokenizer)
    assert [ours.encode(text) for text in TEXTS] == [theirs(text)["input_ids"] for text in TEXTS]
    assert "is used, but text after a control piece is encoded differently" in caplog.text


class Named(Changed):
    """A tokenizer that names special tokens or ids that its files do not."""

    def __init__(self, inner: Any, **named: Any) -> None:
        super().__init__(inner)
        vars(self).update(named)


@pytest.mark.parametrize(
    ("named", "seen"),
    [
        ({"special_tokens_map": {"eos_token": "<|im_start|>"}}, "its bos_token is None, ours '<|im_start|>'"),
        ({"special_tokens_map": {"image_token": "<|img|>"}}, "its bos_token is None"),
        ({"bos_token_id": 7}, "its bos_token_id is 7, ours "),
        ({"eos_token_id": 7}, "its eos_token_id is 7, ours "),
    ],
    ids=str,
)
def test_special_tokens_are_compared_too(named: dict[str, Any], seen: str, caplog: pytest.LogCaptureFixture) -> None:
    theirs = opened("smollm2")
    assert as_tokenizer(Named(theirs, special_tokens_map=theirs.special_tokens_map)) is not None
    assert as_tokenizer(Named(theirs, **named)) is None
    assert f"only token ids go in and out: {seen}" in caplog.text


def test_special_tokens_of_other_names_are_compared_too(caplog: pytest.LogCaptureFixture) -> None:
    theirs = opened("smollm2")
    named = theirs.special_tokens_map | {"image_token": "<|img|>"}
    assert as_tokenizer(Named(theirs, special_tokens_map=named)) is None
    assert "its image_token is '<|img|>', ours None" in caplog.text
    assert as_tokenizer(Named(theirs, special_tokens_map=named | {"image_token": None})) is not None


@pytest.mark.parametrize(("kind", "letter"), [("smollm2", "e"), ("llama2_json_of_its_own", "f")])
def test_decodings_are_compared_too(kind: str, letter: str, caplog: pytest.LogCaptureFixture) -> None:
    theirs = opened(kind)
    backend = theirs.backend_tokenizer
    backend.decoder = decoders.Sequence([backend.decoder, decoders.Replace(letter, "ж")])
    assert as_tokenizer(theirs) is None
    assert "only token ids go in and out: the ids [" in caplog.text
    assert "ж" in caplog.text


class Cleaning(Changed):
    """Cleans decoded text, as transformers before 5 does where the files request it."""

    def __init__(self, inner: Any, *, says_so: bool = True, changes: str = "") -> None:
        super().__init__(inner)
        self.clean_up_tokenization_spaces, self._changes = says_so, changes

    def decode(self, ids: list[int], *, clean_up_tokenization_spaces: bool | None = None, **options: Any) -> str:
        text = str(self._inner.decode(ids, clean_up_tokenization_spaces=False, **options)) + self._changes
        return text if clean_up_tokenization_spaces is False else text.replace(" ,", ",").replace(" .", ".")


def test_cleaning_up_spaces_alone_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert as_tokenizer(Cleaning(opened("smollm2"))) is not None
    (record,) = [record for record in caplog.records if record.name == "fastllama"]
    assert record.getMessage().startswith(
        "tokenizer Cleaning is used, but its clean_up_tokenization_spaces is not followed: the ids ["
    )
    assert "are the text \"Well, it's so. Do n't we 've ?\" by it" in record.getMessage().replace("it 's", "it's")


@pytest.mark.parametrize("options", [{"says_so": False}, {"changes": "!"}], ids=str)
def test_another_change_of_decoded_text_is_no_cleaning_up(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    assert as_tokenizer(Cleaning(opened("smollm2"), **options)) is None
    assert "only token ids go in and out: the ids [" in caplog.text


@pytest.mark.skipif(not BEFORE_5, reason="transformers 5 does not clean up")
def test_transformers_before_5_cleans_up(caplog: pytest.LogCaptureFixture) -> None:
    theirs = AutoTokenizer.from_pretrained(folders.folder("llama3"), clean_up_tokenization_spaces=True)
    ours = as_tokenizer(theirs)
    assert ours is not None
    ids = theirs("Well , it is .")["input_ids"]
    assert ours.decode(ids) == "Well , it is ." != theirs.decode(ids, skip_special_tokens=True)
    assert "its clean_up_tokenization_spaces is not followed" in caplog.text
