"""Tokenizers of Llama checkpoints: SentencePiece's tokenizer.model and Hugging Face's tokenizer.json, one face."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece

from fastllama.errors import CheckpointError, ExtraRequiredError

_SPACE = "▁"  # U+2581: how SentencePiece writes a space in its pieces
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_INFILLING = ("PRE", "SUF", "MID", "EOT")
# Where text would spell an infilling piece (a space or the start, then "<PRE>"): between its "<" and the rest.
_INSIDE_INFILLING_TAG = re.compile(rf"(?:(?<=\A<)|(?<=[ {_SPACE}]<))(?=(?:{'|'.join(_INFILLING)})>)")
_ANCHOR = "☺"  # as in Code Llama's reference: takes the leading space in place of the text that must not get it


class InfillingIds(NamedTuple):
    """Token ids of Code Llama's infilling pieces; generation of the middle ends with `end` (`▁<EOT>`)."""

    prefix: int
    suffix: int
    middle: int
    end: int


class Vocabulary(NamedTuple):
    """What each token id stands for: its piece as the file spells it, its UTF-8 bytes, and which ids are special."""

    pieces: Mapping[int, str]
    text: Mapping[int, bytes]
    special: frozenset[int]


class Tokenizer(ABC):
    """Text to token ids and back. Plain text never becomes a special id: "</s>" in a prompt is four letters and signs.

    Every id stands for a string of bytes, so decoding is their concatenation, less the one leading space that
    encoding added, read as UTF-8 with U+FFFD for each invalid sequence. Special ids (BOS, EOS, unknown, infilling) have
    no text unless shown. `decode(encode(text)) == text` for every valid text without U+2581, which SentencePiece cannot
    tell from a space.
    """

    def __init__(self, path: Path, vocabulary: Vocabulary, bos: int, eos: int, pad: int | None) -> None:
        """`path`: the file it was read from; `bos`, `eos`, `pad`: token ids, `pad` None where the file names none."""
        self.path = path
        self.vocab_size = max(vocabulary.pieces) + 1
        self.bos_token_id = bos
        self.eos_token_id = eos
        self.pad_token_id = pad
        ids = {piece: token_id for token_id, piece in vocabulary.pieces.items()}
        tags = [f"{_SPACE}<{name}>" for name in _INFILLING]
        self.infilling = InfillingIds(*(ids[tag] for tag in tags)) if all(tag in ids for tag in tags) else None
        self.special_ids = vocabulary.special | frozenset(self.infilling or ())
        self._pieces = vocabulary.pieces
        self._text = vocabulary.text
        first = self._encode_raw("a")
        self.adds_leading_space = bool(first) and self._pieces[first[0]].startswith(_SPACE)

    @abstractmethod
    def _encode_raw(self, text: str) -> list[int]:
        """Ids of valid Unicode text, with the model's leading space and without BOS."""

    def _encode_continuation(self, text: str) -> list[int]:
        """Ids of text without the leading space."""
        return self._encode_raw(_ANCHOR + text)[len(self._encode_raw(_ANCHOR)) :]

    def _encode_plain(self, text: str, *, continuation: bool = False) -> list[int]:
        """Checked text to ids, none of them special even where the text spells an infilling piece."""
        if not isinstance(text, str):
            raise TypeError(f"text must be str, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            raise ValueError(f"text is not valid Unicode: lone surrogate U+{code:04X} at index {error.start}") from None
        head, *rest = _INSIDE_INFILLING_TAG.split(text) if self.infilling else [text]
        ids = self._encode_continuation(head) if continuation else self._encode_raw(head)
        for part in rest:
            ids += self._encode_continuation(part)
        return ids

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Token ids of `text`, after the BOS id if `bos`. TypeError unless str, ValueError for a lone surrogate."""
        ids = self._encode_plain(text)
        return [self.bos_token_id, *ids] if bos else ids

    def encode_infilling(self, prefix: str, suffix: str) -> list[int]:
        """Prompt that asks Code Llama for the text between two: BOS ▁<PRE> prefix ▁<SUF> suffix ▁<MID>.

        The prefix-suffix-middle format of Code Llama (arXiv:2308.12950, section 2.3), whose suffix has no leading
        space. ValueError where the vocabulary lacks the four infilling pieces.
        """
        if self.infilling is None:
            wanted = ", ".join(f"{_SPACE}<{name}>" for name in _INFILLING)
            raise ValueError(f"{self.path} cannot infill: its vocabulary lacks Code Llama's pieces {wanted}")
        before = self._encode_plain(prefix)
        after = self._encode_plain(suffix, continuation=True)
        return [self.bos_token_id, self.infilling.prefix, *before, self.infilling.suffix, *after, self.infilling.middle]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; special ids appear as their pieces unless skipped. ValueError for an id without a piece."""
        data = b"".join([self.token_bytes(i, skip_special_tokens=skip_special_tokens) for i in ids])
        if self.adds_leading_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")

    def token_bytes(self, token_id: int, *, skip_special_tokens: bool = True) -> bytes:
        """UTF-8 bytes that an id adds to a text: part of a character for a byte piece, none for a skipped special."""
        try:
            data = self._text[token_id]
        except KeyError:
            raise self._unknown(token_id) from None
        return b"" if skip_special_tokens and token_id in self.special_ids else data

    def id_to_piece(self, token_id: int) -> str:
        """The piece as the tokenizer file spells it, such as "▁Hello" or "<0x0A>"."""
        try:
            return self._pieces[token_id]
        except KeyError:
            raise self._unknown(token_id) from None

    def _unknown(self, token_id: int) -> ValueError:
        return ValueError(f"token id {token_id} is not in {self.path}; legal: 0 to {self.vocab_size - 1}")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece tokenizer.model (Llama 1 and 2, Code Llama): BPE with byte pieces and a leading space."""

    def __init__(self, path: Path) -> None:
        """`path`: the model file. CheckpointError if it is not a SentencePiece model with BOS and EOS pieces."""
        data = path.read_bytes()
        if not data:  # SentencePiece takes no bytes for a model, and complains on stderr when asked
            raise CheckpointError(f"{path} is empty; legal: a SentencePiece tokenizer.model")
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(data)
        except RuntimeError:
            raise CheckpointError(f"{path} is broken or not a SentencePiece tokenizer.model") from None
        bos, eos, pad = self._processor.bos_id(), self._processor.eos_id(), self._processor.pad_id()
        if bos < 0 or eos < 0:
            raise CheckpointError(f"{path} is not a Llama tokenizer: it has no {'BOS' if bos < 0 else 'EOS'} piece")
        super().__init__(path, self._vocabulary(), bos, eos, pad if pad >= 0 else None)

    def _vocabulary(self) -> Vocabulary:
        processor = self._processor
        ids = list(range(processor.vocab_size()))
        pieces = dict(enumerate(processor.id_to_piece(ids)))
        text = {i: _piece_bytes(piece) for i, piece in pieces.items()}
        hidden = zip(ids, processor.is_control(ids), processor.is_unknown(ids), strict=True)
        return Vocabulary(pieces, text, frozenset(i for i, control, unknown in hidden if control or unknown))

    def _encode_raw(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids


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
        spec = _read_json(path)
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
        super().__init__(path, vocabulary, named["bos"], named["eos"], named["pad"])
        # The Metaspace layout of transformers 5 adds no space to text that begins with one; SentencePiece always does.
        self._swallows_space = self._encode_raw(" a") == self._encode_raw("a")

    def _named_id(self, path: Path, name: str) -> Any:
        """Id of the BOS, EOS or padding token as the files say, unchecked; the first of several EOS ids."""
        token = _read_json(path.with_name("tokenizer_config.json"), missing={}).get(f"{name}_token")
        if isinstance(token, dict):  # a serialized AddedToken
            token = token.get("content")
        if isinstance(token, str):
            return self._backend.token_to_id(token)
        ids = _read_json(path.with_name("config.json"), missing={}).get(f"{name}_token_id")
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
            text = {i: _piece_bytes(piece) for i, piece in pieces.items()}
        else:
            raise CheckpointError(
                f"{path} is not a Llama tokenizer: its decoder is {', '.join(kinds) or 'absent'}; "
                "legal: ByteFallback or Metaspace (Llama 2), ByteLevel (Llama 3)"
            )
        unknown = self._backend.token_to_id(spec["model"].get("unk_token") or "<unk>")
        special = {i for i, token in added.items() if token.special} | ({unknown} if unknown is not None else set())
        return Vocabulary(pieces, text, frozenset(special))

    def _encode_raw(self, text: str) -> list[int]:
        if self._swallows_space and text.startswith((" ", _SPACE)):
            text = " " + text
        return self._backend.encode(text, add_special_tokens=False).ids


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer at `path`: a tokenizer.model, a tokenizer.json, or a folder holding one (tokenizer.model first).

    FileNotFoundError where there is none, CheckpointError for a broken or foreign file, ExtraRequiredError for a
    tokenizer.json without the extra [hf].
    """
    path = Path(path)
    if path.is_dir():
        names = ("tokenizer.model", "tokenizer.json")
        found = next((path / name for name in names if (path / name).is_file()), None)
        if found is None:
            raise FileNotFoundError(f"no tokenizer in {path}; legal: {' or '.join(names)}")
        path = found
    elif not path.is_file():
        raise FileNotFoundError(f"no tokenizer at {path}; legal: tokenizer.model, tokenizer.json or a folder with one")
    return HFTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)


def _piece_bytes(piece: str) -> bytes:
    """UTF-8 of a SentencePiece piece; one byte for a byte piece such as "<0x0A>"."""
    return bytes([int(piece[3:5], 16)]) if _BYTE_PIECE.fullmatch(piece) else piece.replace(_SPACE, " ").encode()


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


def _read_json(path: Path, *, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON object in `path`; `missing` in place of a file that is not there."""
    if missing is not None and not path.is_file():
        return missing
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; legal: an object")
    return value
