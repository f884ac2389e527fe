"""Long texts are given to SentencePiece in parts, so that it keeps the GIL for a short time only."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllama.io.tokenizer import SentencePieceTokenizer, load_tokenizer, sentencepiece_model
from tests.io import tokenizer_folders as folders

LINES = ["the dog and the cat", "the  dog   and    the cat", "if a:\n    the dog\n        and the cat"] * 20
# Pieces then hold spaces after letters, runs of spaces, or neither.
TRAINED = {
    "across": {"split_by_whitespace": False, "remove_extra_whitespaces": False},
    "runs": {"allow_whitespace_only_pieces": True, "remove_extra_whitespaces": False},
    "collapsing": {"normalization_rule_name": "identity", "remove_extra_whitespaces": True},
}
BUNDLED = Path(sentencepiece_model.__file__).parents[2] / "assets" / "tiny"
PARTS = ["the", " dog", " ", "  ", "    ", "\n", "\u2581", "é", "語", "<s>", "\t", "and the "]


@pytest.fixture(scope="module", params=[*TRAINED, "bundled", "every_flag"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    path = folders.folder(request.param) if request.param == "every_flag" else BUNDLED
    if request.param in TRAINED:
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES),
            model_writer=model,
            model_type="bpe",
            byte_fallback=True,
            vocab_size=320,
            hard_vocab_limit=False,
            minloglevel=2,
            **TRAINED[request.param],
        )
        path = tmp_path_factory.mktemp(request.param)
        (path / "tokenizer.model").write_bytes(model.getvalue())
    found = load_tokenizer(path)
    assert isinstance(found, SentencePieceTokenizer)
    return found


@given(parts=st.lists(st.sampled_from(PARTS), max_size=30), at_once=st.integers(1, 9))
@settings(deadline=None, max_examples=200)
def test_a_text_in_parts_has_the_ids_of_the_whole(
    tokenizer: SentencePieceTokenizer, parts: list[str], at_once: int
) -> None:
    text = "".join(parts)
    whole = tokenizer.encode(text), tokenizer.encode_template(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sentencepiece_model, "_AT_ONCE", at_once)
        assert (tokenizer.encode(text), tokenizer.encode_template(text)) == whole


def test_words_are_divided_in_short_parts_unless_a_piece_reaches_from_one_to_the_next(
    tokenizer: SentencePieceTokenizer,
) -> None:
    pieces = [tokenizer.id_to_piece(i) for i in range(tokenizer.vocab_size)]
    reaches = any(sentencepiece_model.SPACE in piece.lstrip(sentencepiece_model.SPACE) for piece in pieces)
    lengths = [len(part) for part in tokenizer._at_once("once upon a time  there was " * 2000)]
    assert (len(lengths) == 1) is reaches
    assert reaches or max(lengths) < sentencepiece_model._AT_ONCE + 20


def test_blanks_alone_have_the_tokens_that_they_have_at_the_least(tokenizer: SentencePieceTokenizer) -> None:
    for text in (" " * 3000, "\n" * 3000, " \t\r\n" * 1000, f"a{' ' * 3000}<s>{' ' * 3000}b"):
        assert tokenizer.least_length(text) <= min(len(tokenizer.encode(text)), len(tokenizer.encode_template(text)))
