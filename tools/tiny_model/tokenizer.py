"""The tokenizer: SentencePiece BPE with Llama 2's settings, trained on the stories and chats."""

from __future__ import annotations

import io
from collections.abc import Iterable

import sentencepiece

from .chat import document


def train_tokenizer(documents: int, vocab_size: int) -> bytes:
    """The serialized SentencePiece model trained on the first `documents` documents; deterministic.

    It sees single lines, so that a line break stays the byte token <0x0A>, as in Llama 2.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(
            line for seed in range(documents) for piece in document(seed) for line in piece.splitlines()
        ),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        add_dummy_prefix=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=0.99995,
        max_sentence_length=16384,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def load_tokenizer(model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def encode(tokenizer: sentencepiece.SentencePieceProcessor, pieces: Iterable[str]) -> list[int]:
    """The ids of a document: BOS, the text, EOS for each of its pieces."""
    return [token for piece in pieces for token in (tokenizer.bos_id(), *tokenizer.encode(piece), tokenizer.eos_id())]


def document_ids(tokenizer: sentencepiece.SentencePieceProcessor, seed: int) -> list[int]:
    """The ids of training document `seed`."""
    return encode(tokenizer, document(seed))
