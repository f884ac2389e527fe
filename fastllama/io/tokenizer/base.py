"""The face of all tokenizers: text to token ids and back, whatever file the vocabulary lies in."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from fastllama.io.tokenizer.settings import TokenizerSettings

SPACE = "▁"  # U+2581: how SentencePiece writes a space in its pieces
_INFILLING = ("PRE", "SUF", "MID", "EOT")
# Where text would spell an infilling piece (a space or the start, then "<PRE>"): between its "<" and the rest.
_INSIDE_INFILLING_TAG = re.compile(rf"(?:(?<=\A<)|(?<=[ {SPACE}]<))(?=(?:{'|'.join(_INFILLING)})>)")
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

    def __init__(
        self,
        path: Path,
        vocabulary: Vocabulary,
        bos: int | None,
        eos: int,
        pad: int | None,
        settings: TokenizerSettings | None = None,
    ) -> None:
        """`path`: the file it was read from; `bos`, `eos`, `pad`: token ids, `pad` None where the file names none."""
        self.path = path
        self.vocab_size = max(vocabulary.pieces) + 1
        self.bos_token_id = bos
        self.eos_token_id = eos
        self.pad_token_id = pad
        ids = {piece: token_id for token_id, piece in vocabulary.pieces.items()}
        tags = [f"{SPACE}<{name}>" for name in _INFILLING]
        self.infilling = InfillingIds(*(ids[tag] for tag in tags)) if all(tag in ids for tag in tags) else None
        self.special_ids = vocabulary.special | frozenset(self.infilling or ())
        settings = settings or TokenizerSettings()
        self.special_tokens = settings.special_tokens
        self.chat_template = settings.chat_template
        self._settings = settings
        self._pieces = vocabulary.pieces
        self._ids = ids
        found = sorted(self.special_pieces(), key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, found))) if found else None
        self._text = vocabulary.text
        first = self._encode_raw("a")
        self.adds_leading_space = bool(first) and self._pieces[first[0]].startswith(SPACE)

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

    def encode(self, text: str, *, bos: bool | None = None) -> list[int]:
        """Token ids of `text`, after BOS and before EOS as the files say; exactly one BOS or none if `bos` says so.

        TypeError unless str, ValueError for a lone surrogate.
        """
        ids = self._encode_plain(text)
        add_bos = self._settings.add_bos if bos is None else bos
        return [self.bos_token_id, *ids] if add_bos and self.bos_token_id is not None else ids

    def encode_template(self, text: str) -> list[int]:
        """Token ids of a rendered chat template: special and added pieces in it become ids, none is put around it."""
        ids: list[int] = []
        start = 0
        for found in self._added.finditer(text) if self._added else ():
            part = text[start : found.start()]
            ids += (self._encode_continuation(part) if start else self._encode_plain(part)) if part else []
            ids.append(self._ids[found[0]])
            start = found.end()
        part = text[start:]
        return ids + ((self._encode_continuation(part) if start else self._encode_plain(part)) if part else [])

    def special_pieces(self) -> frozenset[str]:
        """The texts that `encode_template` turns into special ids: what a chat message may not hold."""
        return frozenset(self._pieces[i] for i in self.special_ids)

    def encode_infilling(self, prefix: str, suffix: str) -> list[int]:
        """Prompt that asks Code Llama for the text between two: BOS ▁<PRE> prefix ▁<SUF> suffix ▁<MID>.

        The prefix-suffix-middle format of Code Llama (arXiv:2308.12950, section 2.3), whose suffix has no leading
        space. ValueError where the vocabulary lacks the four infilling pieces.
        """
        if self.infilling is None:
            wanted = ", ".join(f"{SPACE}<{name}>" for name in _INFILLING)
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
