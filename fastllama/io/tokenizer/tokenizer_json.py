"""Hugging Face's tokenizer.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastllama.errors import CheckpointError, ExtraRequiredError
from fastllama.io.tokenizer.base import SPACE, Tokenizer, Vocabulary
from fastllama.io.tokenizer.sentencepiece_model import piece_bytes
from fastllama.io.tokenizer.settings import read_json, read_settings


class HFTokenizer(Tokenizer):
    """A tokenizer.json: SentencePiece's BPE converted (Llama 2) or byte-level BPE (Llama 3). Needs the extra [hf].

    On a converted Llama 2 tokenizer its results equal SentencePieceTokenizer's. BOS, EOS and padding are those of
    the tokenizer_config.json beside the file, else of config.json.
    """

    def __init__(self, path: Path) -> None:
        """`path`: the tokenizer.json. CheckpointError if it is broken or of another family."""
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError:
            raise ExtraRequiredError(f"reading {path.name}", "tokenizers", "hf") from None
        spec = read_json(path)
        try:
            self._backend = Backend.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the package raises bare Exception
            raise CheckpointError(f"{path} is not a tokenizer.json that tokenizers can read: {error}") from None
        self._backend.encode_special_tokens = True  # added special tokens are not looked for in plain text
        self._backend.no_truncation()
        self._backend.no_padding()
        vocabulary = self._vocabulary(path, spec)
        named = {name: self._named_id(path, name) for name in ("bos", "eos", "pad")}
        for name in ("bos", "eos"):
            if named[name] not in vocabulary.pieces:
                raise CheckpointError(
                    f"{path} holds no {name.upper()} piece: tokenizer_config.json ({name}_token) "
                    f"and config.json ({name}_token_id) beside it name none of its pieces"
                )
        self._swallows_space = False
        super().__init__(path, vocabulary, named["bos"], named["eos"], named["pad"], read_settings(path.parent))
        # The Metaspace layout of transformers 5 adds no space to text that begins with one; SentencePiece always does.
        self._swallows_space = self._encode_raw(" a") == self._encode_raw("a")

    def _named_id(self, path: Path, name: str) -> Any:
        """Id of the BOS, EOS or padding token as the files say, unchecked; the first of several EOS ids."""
        token = read_json(path.with_name("tokenizer_config.json"), missing={}).get(f"{name}_token")
        if isinstance(token, dict):  # a serialized AddedToken
            token = token.get("content")
        if isinstance(token, str):
            return self._backend.token_to_id(token)
        ids = read_json(path.with_name("config.json"), missing={}).get(f"{name}_token_id")
        return next(iter(ids), None) if isinstance(ids, list) else ids

    def _vocabulary(self, path: Path, spec: Mapping[str, Any]) -> Vocabulary:
        pieces = {i: piece for piece, i in self._backend.get_vocab(with_added_tokens=True).items()}
        added = self._backend.get_added_tokens_decoder()
        decoders = list(_decoders(spec.get("decoder")))
        kinds = [decoder["type"] for decoder in decoders]
        if "ByteLevel" in kinds:
            byte_of = _byte_level_alphabet()
            text = {i: b"".join(byte_of.get(c) or c.encode() for c in piece) for i, piece in pieces.items()}
            text |= {i: token.content.encode() for i, token in added.items()}
        elif "Metaspace" in kinds or "ByteFallback" in kinds:
            text = {i: piece_bytes(piece) for i, piece in pieces.items()}
        else:
            raise CheckpointError(
                f"{path} is not a Llama tokenizer: its decoder is {', '.join(kinds) or 'absent'}; "
                "legal: ByteFallback or Metaspace (Llama 2), ByteLevel (Llama 3)"
            )
        unknown = self._backend.token_to_id(spec["model"].get("unk_token") or "<unk>")
        special = {i for i, token in added.items() if token.special} | ({unknown} if unknown is not None else set())
        return Vocabulary(pieces, text, frozenset(special))

    def _encode_raw(self, text: str) -> list[int]:
        if self._swallows_space and text.startswith((" ", SPACE)):
            text = " " + text
        return self._backend.encode(text, add_special_tokens=False).ids


def _byte_level_alphabet() -> dict[str, bytes]:
    """The printable character that stands for each byte in byte-level BPE (GPT-2): itself, else U+0100 and upwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    shown = {chr(byte): bytes([byte]) for byte in printable}
    return shown | {chr(0x100 + n): bytes([byte]) for n, byte in enumerate(others)}


def _decoders(decoder: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The decoder of a tokenizer.json, its sequences flattened."""
    if decoder is None:
        return
    if decoder["type"] == "Sequence":
        for inner in decoder["decoders"]:
            yield from _decoders(inner)
    else:
        yield decoder
