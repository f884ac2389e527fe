"""SentencePiece's tokenizer.model, with the added tokens of the files beside it."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import sentencepiece

from fastllama.errors import CheckpointError
from fastllama.io.formats.recognise import what_is
from fastllama.io.tokenizer.added import AddedMatcher, AddedPiece, number
from fastllama.io.tokenizer.base import ANCHOR, CONTROL_PIECES, INFILLING_PIECES, SPACE, Frame, Tokenizer, Vocabulary
from fastllama.io.tokenizer.settings import CONFIG, TokenizerSettings, read_settings

_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
# Not after a blank, or a character that normalizes to one: that would split a run of blanks.
_WORD_END = re.compile(r"(?<=\w) ")
_ACROSS_WORDS = re.compile(f"[^{SPACE}]{SPACE}")
_AT_ONCE = 4096  # characters, for which SentencePiece holds the GIL for some 2 ms
_LOG = logging.getLogger("fastllama")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece tokenizer.model (Llama 1 and 2, Code Llama, Yi): BPE with byte pieces and a leading space.

    Merges follow the model file's scores (transformers 5 merges by ids: other pieces for Llama 2's runs of spaces), and
    normalization and the leading space follow it too (transformers leaves out the space where tokenizer_config.json
    names another class than LlamaTokenizer). Without a tokenizer_config.json, BOS is added as in Meta's reference; if
    it does not set add_bos_token, BOS is not added, as in transformers 5.
    """

    def __init__(self, path: Path) -> None:
        """path: the model file. CheckpointError if it or a settings file is broken, or if there is no EOS piece."""
        self._processor = processor = _read_model(path)
        pieces = dict(enumerate(processor.id_to_piece(list(range(processor.vocab_size())))))
        own = {"bos_token": processor.bos_id(), "eos_token": processor.eos_id(), "unk_token": processor.unk_id()}
        settings = read_settings(path.parent)
        named = {name: pieces[i] for name, i in own.items() if i >= 0 and name not in settings.removed}
        settings = replace(settings, special_tokens={**named, **settings.special_tokens})
        added = self._added(path, settings, {piece: i for i, piece in pieces.items()})
        pieces |= {i: piece.content for i, piece in added.items()}
        ids = {piece: i for i, piece in pieces.items()}

        plain = {ids[piece] for piece in (*CONTROL_PIECES, *INFILLING_PIECES) if piece in ids}
        self._matcher = AddedMatcher(added)
        self._plain_matcher = AddedMatcher({i: piece for i, piece in added.items() if i not in plain})
        self._may_drop_blanks = _drops_blanks(processor) or any(each.lstrip or each.rstrip for each in added.values())
        self._adds_space = settings.add_prefix_space is not False
        self._space_after_added = settings.legacy
        bos, eos, pad = (ids.get(settings.special_tokens.get(f"{name}_token", "")) for name in ("bos", "eos", "pad"))
        if eos is None:
            eos = processor.eos_id()
        if eos < 0:
            raise CheckpointError(f"{path} is not a Llama tokenizer: it has no EOS piece, and {CONFIG} names none")
        if pad is None and processor.pad_id() >= 0:
            pad = processor.pad_id()
        super().__init__(
            path,
            Vocabulary(
                pieces,
                {i: piece_bytes(piece) for i, piece in pieces.items()},
                frozenset(i for i, piece in added.items() if piece.special),
                frozenset(added),
            ),
            bos,
            eos,
            pad,
            frame=_frame(path, settings, bos, eos),
            adds_leading_space=self._adds_space and processor.normalize("a").startswith(SPACE),
            settings=settings,
        )

    def _added(self, path: Path, settings: TokenizerSettings, ids: Mapping[str, int]) -> dict[int, AddedPiece]:
        """Added tokens by id: the model's control and user-defined pieces, and those of the settings files."""
        processor = self._processor
        special = set(settings.special_tokens.values())
        hidden = [piece for piece, i in ids.items() if processor.is_control(i) or processor.is_unknown(i)]
        own = [AddedPiece(piece) for piece in hidden if piece in special or not settings.lists_extra]
        own += [AddedPiece(piece, special=piece in special) for piece in _user_defined(processor)]
        given = settings.added(own)
        added = number([*own, *given], ids)
        numbers = {piece.content: i for i, piece in added.items()}
        for piece in given:
            if piece.token_id not in (None, numbers[piece.content]):
                _LOG.warning(
                    "%s: added token %r has the id %d in the files beside it, which is another piece's; it is %d here, "
                    "as in transformers",
                    *(path, piece.content, piece.token_id, numbers[piece.content]),
                )
        return added

    def _encode_raw(self, text: str, *, template: bool = False) -> list[int]:
        ids: list[int] = []
        for token_id, part, begins in (self._matcher if template else self._plain_matcher).split(text):
            if token_id is not None:
                ids.append(token_id)
                continue
            # transformers adds no space to text that begins with one; for plain text we do.
            spaced = part.startswith((" ", SPACE)) and (template or not begins)
            first, *rest = self._at_once(part)
            if self._adds_space and (begins or self._space_after_added) and not spaced:
                ids += self._processor.encode(first)
            else:
                ids += self._unspaced(first)
            for more in rest:
                ids += self._unspaced(more)
        return ids

    def _at_once(self, text: str) -> Iterator[str]:
        """A text in parts of about _AT_ONCE characters, split at spaces that no piece spans."""
        start = 0
        while self._ends_at_words and (cut := _WORD_END.search(text, start + _AT_ONCE)):
            yield text[start : cut.start()]
            start = cut.start()
        yield text[start:]

    @functools.cached_property
    def _ends_at_words(self) -> bool:
        """Whether no piece has a space after another character, so that words are encoded independently."""
        return not any(map(_ACROSS_WORDS.search, self._vocabulary.pieces.values()))

    def _normalize(self, text: str) -> str:
        normalized: str = self._processor.normalize(text)
        return normalized

    def _unspaced(self, text: str) -> list[int]:
        """Ids of text without added tokens and without the leading space."""
        anchor = len(self._processor.encode(ANCHOR))
        ids: list[int] = self._processor.encode(ANCHOR + text)[anchor:]
        return ids


def _drops_blanks(processor: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether normalization merges several spaces into one, or drops those at the ends."""
    text = "a  \t\r\n\n b  "
    return text not in processor.normalize(text).replace(SPACE, " ")


def piece_bytes(piece: str) -> bytes:
    """UTF-8 of a SentencePiece piece; one byte for a byte piece such as "<0x0A>"."""
    return bytes([int(piece[3:5], 16)]) if _BYTE_PIECE.fullmatch(piece) else piece.replace(SPACE, " ").encode()


def _read_model(path: Path) -> sentencepiece.SentencePieceProcessor:
    data = path.read_bytes()
    processor = sentencepiece.SentencePieceProcessor()
    try:
        if data:  # SentencePiece accepts an empty file, and prints to stderr later
            processor.LoadFromSerializedProto(data)
            return processor
    except RuntimeError:
        pass
    what = what_is(path)
    broken = what is None or what == "a SentencePiece model"
    raise CheckpointError(f"{path} is {'broken or not a SentencePiece model' if broken else what}")


def _user_defined(processor: sentencepiece.SentencePieceProcessor) -> Iterator[str]:
    """Pieces of type USER_DEFINED, parsed here as the package has no query: ModelProto.pieces (field 1) of type 4."""
    data: bytes = processor.serialized_model_proto()
    start = token_id = 0
    while data[start : start + 1] == b"\x0a":
        start, size, shift = start + 1, 0, 0
        while True:  # a varint: seven bits a byte, the lowest first
            byte = data[start]
            start, size, shift = start + 1, size | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                break
        start += size
        if data[start - 2 : start] == b"\x18\x04":  # field 3 (type) comes last
            yield processor.id_to_piece(token_id)
        token_id += 1


def _frame(path: Path, settings: TokenizerSettings, bos: int | None, eos: int) -> Frame:
    add_bos = settings.add_bos
    if add_bos is None:
        add_bos = not settings.is_given or settings.tokenizer_class == "CodeLlamaTokenizer"
        if not add_bos:
            _LOG.warning("%s does not set add_bos_token: no BOS, as in transformers 5", path.with_name(CONFIG))
    ends = settings.add_eos and "eos_token" in settings.special_tokens
    return Frame((bos,) if add_bos and bos is not None else (), (eos,) if ends else ())
