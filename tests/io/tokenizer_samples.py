"""The tokenizers that tests/io runs on: the bundled one, Llama 2's where it is at hand, and variants made from them."""

from __future__ import annotations

import functools
import json
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor

import fastllama
from fastllama.io.tokenizer import HFTokenizer, SentencePieceTokenizer, Tokenizer

TINY = Path(fastllama.__file__).parent / "assets" / "tiny" / "tokenizer.model"
LLAMA2 = Path(__file__).parents[2] / ".." / "shared" / "data" / "llama2-tokenizer" / "tokenizer.model"
MODELS = {"tiny": TINY, "llama2": LLAMA2}
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # SentencePiece's ModelProto.SentencePiece.Type
LAYOUTS = ("prepend", "metaspace")
INFILLING = ["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"]


def model_bytes(name: str) -> bytes:
    """tokenizer.model of `name`; skips the test where Llama 2's is not at hand."""
    if name == "llama2" and not LLAMA2.is_file():
        pytest.skip("needs Llama 2's tokenizer.model in ../shared/data/llama2-tokenizer")
    return MODELS[name].read_bytes()


@functools.cache
def tokenizer(kind: str) -> Tokenizer:
    """The tokenizer of a kind such as "tiny", "llama2" or "tiny-prepend" (a tokenizer.json in that layout)."""
    name, _, layout = kind.partition("-")
    with tempfile.TemporaryDirectory() as folder:
        return load(model_bytes(name), Path(folder), layout)


def load(model: bytes, folder: Path, layout: str = "") -> Tokenizer:
    """A tokenizer over `model` as tokenizer.model, or converted to tokenizer.json in `layout`."""
    if layout:
        return HFTokenizer(write_json(model, folder, layout))
    path = folder / "tokenizer.model"
    path.write_bytes(model)
    return SentencePieceTokenizer(path)


def write_json(model: bytes, folder: Path, layout: str) -> Path:
    """tokenizer.json and tokenizer_config.json of a SentencePiece model, merges ranked by the scores of what they make.

    Layout "prepend" is that of Llama 2 on the hub (a normalizer, no pre-tokenizer), "metaspace" that which transformers
    writes since 4.40.
    """
    processor = SentencePieceProcessor(model_proto=model)
    vocabulary = {processor.id_to_piece(i): i for i in range(processor.vocab_size())}
    special = [piece for piece, i in vocabulary.items() if i < 3 or piece in INFILLING]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec = {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},  # to be ignored
        "added_tokens": [{"id": vocabulary[piece], "content": piece, **flags} for piece in special],
        "normalizer": prepend if layout == "prepend" else None,
        "pre_tokenizer": metaspace if layout == "metaspace" else None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [vocabulary["<s>"]], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocabulary,
            "merges": _merges(model),
        },
    }
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(spec))
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "unk_token": "<unk>"}
    path.with_name("tokenizer_config.json").write_text(json.dumps(config))
    return path


@functools.cache
def _merges(model: bytes) -> list[tuple[str, str]]:
    """Every way to make a piece of two, best score first; longer left parts first among equals."""
    processor = SentencePieceProcessor(model_proto=model)
    vocabulary = {processor.id_to_piece(i): i for i in range(processor.vocab_size())}
    ranked = [
        (-processor.get_score(i), -cut, piece)
        for piece, i in vocabulary.items()
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    return [(piece[:-negative], piece[-negative:]) for _, negative, piece in sorted(ranked)]


def with_pieces(model: bytes, pieces: list[str], kind: int) -> bytes:
    """A SentencePiece model with pieces added at its end: serialized messages merge by concatenation."""
    added = b""
    for piece in pieces:
        body = _field(1, piece.encode()) + b"\x15" + struct.pack("<f", -1e6) + b"\x18" + bytes([kind])
        added += _field(1, body)
    return model + added


def without_bos(model: bytes) -> bytes:
    """A SentencePiece model whose trainer_spec (field 2) names a bos_piece (field 46) that is not there."""
    return model + _field(2, _field(46, b"<none>"))


def _field(number: int, data: bytes) -> bytes:
    """A length-delimited field of the protobuf wire format."""
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    low = value & 0x7F
    return bytes([low | 0x80]) + _varint(value >> 7) if value > 0x7F else bytes([low])
