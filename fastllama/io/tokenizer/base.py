"""The interface of all tokenizers: text to token ids and back."""

from __future__ import annotations

import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fastllama.io.tokenizer.settings import TokenizerSettings

SPACE = "▁"  # U+2581: how SentencePiece writes a space in its pieces
_INFILLING = ("PRE", "SUF", "MID", "EOT")
# Of a SentencePiece vocabulary; encoded as plain text where a text contains them.
CONTROL_PIECES = ("<s>", "</s>", "<unk>")
INFILLING_PIECES = tuple(f"{SPACE}<{name}>" for name in _INFILLING)
# The position after "<" where a text contains an infilling piece (a space or the start, then "<PRE>").
_INSIDE_INFILLING_TAG = re.compile(rf"(?:(?<=\A<)|(?<=[ {SPACE}]<))(?=(?:{'|'.join(_INFILLING)})>)")
ANCHOR = "☺"  # as in Code Llama's reference: absorbs the leading space, so that the text after it gets none
_NORMALIZED = "A\uff21e\u0301\ufb01\xb2\xad\u200b\x07"  # Unicode's normal forms change every character but A
_TAG = re.compile(r"<\|.*\|>", re.DOTALL)


class InfillingIds(NamedTuple):
    """Token ids of Code Llama's infilling pieces; generation of the middle ends with `end` (`▁<EOT>`)."""

    prefix: int
    suffix: int
    middle: int
    end: int


class Vocabulary(NamedTuple):
    """The piece of each token id as spelled in the file, and its UTF-8 bytes; special and added ids."""

    pieces: Mapping[int, str]
    text: Mapping[int, bytes]
    special: frozenset[int]
    added: frozenset[int] = frozenset()


class Frame(NamedTuple):
    """The ids that the files add before and after a text: BOS, EOS or none."""

    before: Sequence[int] = ()
    after: Sequence[int] = ()


class Tokenizer(ABC):
    """Text to token ids and back, as in transformers 5.23 with the same files.

    Every id stands for a string of bytes, so decoding concatenates them, drops the one leading space that encoding
    added, and reads UTF-8 with U+FFFD for each invalid sequence (transformers: for each byte of it). Special ids (BOS,
    EOS, unknown, special added tokens, infilling) have no text unless shown.

    `encode` differs from transformers in two points, as Meta's reference does: it encodes `<s>`, `</s>`, `<unk>` and
    the infilling pieces of a SentencePiece vocabulary as plain text, and it keeps all leading spaces of a text. So
    `decode(encode(text)) == text` for every valid text without added tokens and without U+2581, SentencePiece's symbol
    for a space. `encode_template` does not differ.
    """

    # Whether white space may be lost: absorbed by added tokens, or dropped by normalization.
    _may_drop_blanks = True

    def __init__(
        self,
        path: Path,
        vocabulary: Vocabulary,
        bos: int | None,
        eos: int,
        pad: int | None,
        *,
        frame: Frame | None = None,
        adds_leading_space: bool = False,
        settings: TokenizerSettings | None = None,
    ) -> None:
        """path: the file it was read from; bos, eos, pad: token ids, None where the files specify none."""
        self.path = path
        self.vocab_size = max(vocabulary.pieces) + 1
        self.bos_token_id = bos
        self.eos_token_id = eos
        self.pad_token_id = pad
        self.adds_leading_space = adds_leading_space
        settings = settings or TokenizerSettings()
        self.special_tokens = settings.special_tokens
        self.chat_template = settings.chat_template
        ids = {piece: token_id for token_id, piece in vocabulary.pieces.items()}
        found = [ids[piece] for piece in INFILLING_PIECES if piece in ids]
        self.infilling = InfillingIds(*found) if len(found) == len(INFILLING_PIECES) else None
        self.special_ids = vocabulary.special | frozenset(self.infilling or ())
        self._vocabulary = vocabulary
        self._frame = frame or Frame()

    @abstractmethod
    def _encode_raw(self, text: str, *, template: bool = False) -> list[int]:
        """Ids of valid Unicode text, with the leading space where the files specify it, without BOS and EOS.

        `template`: `<s>`, `</s>`, `<unk>` and infilling pieces become ids too.
        """

    def _encode_continuation(self, text: str) -> list[int]:
        """Ids of plain text without the leading space."""
        return self._encode_raw(ANCHOR + text)[len(self._encode_raw(ANCHOR)) :]

    def _encode_plain(self, text: str, *, continuation: bool = False) -> list[int]:
        """Checked text to ids, none of them an infilling piece even where the text contains one."""
        _check_text(text)
        head, *rest = _INSIDE_INFILLING_TAG.split(text) if self.infilling else [text]
        ids = self._encode_continuation(head) if continuation else self._encode_raw(head)
        for part in rest:
            ids += self._encode_continuation(part)
        return ids

    def encode(self, text: str, *, bos: bool | None = None) -> list[int]:
        """Token ids of `text`. Added tokens in it become their ids; see the class for differences from transformers.

        Args:
            text: any text.
            bos: None adds BOS and EOS as the files specify (add_bos_token, add_eos_token, or the post-processor of
                tokenizer.json). True adds one BOS, False none; neither adds an EOS.

        Raises:
            TypeError: unless `text` is str.
            ValueError: for a lone surrogate, or where BOS is requested and the files specify none.
        """
        ids = self._encode_plain(text)
        if bos is None:
            return [*self._frame.before, *ids, *self._frame.after]
        return [self._bos(), *ids] if bos else ids

    def least_length(self, text: str) -> int:
        """A lower bound of the number of tokens that `encode` returns, from the text's length; 0 where unknown."""
        if not self._keeps_text:
            return 0
        dropped = sum(map(text.count, " \t\n\r")) if self._may_drop_blanks else 0
        return (len(text) - dropped) // self._longest_piece

    @functools.cached_property
    def _keeps_text(self) -> bool:
        """Whether every character but white space ends up in a token: neither dropped by normalization nor unknown."""
        single_bytes = {data for data in self._vocabulary.text.values() if len(data) == 1}
        return len(single_bytes) == 256 and _NORMALIZED in self._normalize(_NORMALIZED)

    @functools.cached_property
    def _longest_piece(self) -> int:
        """Bytes of the longest piece."""
        return max(map(len, self._vocabulary.text.values()))

    def _normalize(self, text: str) -> str:
        """The normalized text, which is then divided into pieces; "" where it is not known."""
        return ""

    def encode_template(self, text: str) -> list[int]:
        """Token ids of a rendered chat template: special and added pieces in it become ids; no BOS or EOS is added.

        Equals `tokenizer(text, add_special_tokens=False)` of transformers. Raises as `encode` does.
        """
        _check_text(text)
        return self._encode_raw(text, template=True)

    def special_pieces(self) -> frozenset[str]:
        """The texts that become special ids in `encode_template`, which a chat message may not contain.

        All special pieces, and those of the other added tokens that the chat template contains or that look like
        "<|im_start|>".
        """
        template = self.chat_template or ""
        pieces = self._vocabulary.pieces
        plain = (pieces[token_id] for token_id in self._vocabulary.added - self.special_ids)
        spelled = (piece for piece in plain if _TAG.fullmatch(piece) or (piece in template and not piece.isspace()))
        return frozenset(spelled) | {pieces[token_id] for token_id in self.special_ids}

    def encode_infilling(self, prefix: str, suffix: str) -> list[int]:
        """Code Llama's infilling prompt: BOS ▁<PRE> prefix ▁<SUF> suffix ▁<MID>.

        The prefix-suffix-middle format of Code Llama (arXiv:2308.12950, section 2.3), whose suffix has no leading
        space. ValueError where the vocabulary lacks the four infilling pieces.
        """
        if self.infilling is None:
            raise ValueError(
                f"{self.path} cannot infill: its vocabulary lacks Code Llama's pieces {', '.join(INFILLING_PIECES)}"
            )
        before = self._encode_plain(prefix)
        after = self._encode_plain(suffix, continuation=True)
        return [self._bos(), self.infilling.prefix, *before, self.infilling.suffix, *after, self.infilling.middle]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; special ids appear as their pieces unless skipped. ValueError for an id beyond the last."""
        data = b"".join([self.token_bytes(i, skip_special_tokens=skip_special_tokens) for i in ids])
        if self.adds_leading_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")

    def token_bytes(self, token_id: int, *, skip_special_tokens: bool = True) -> bytes:
        """UTF-8 bytes that an id adds to a text: part of a character for a byte piece, none for a skipped special id.

        Empty, too, for an id below `vocab_size` without a piece in the vocabulary.
        """
        data = self._vocabulary.text.get(token_id)
        if data is None:
            if not 0 <= token_id < self.vocab_size:
                raise self._unknown(token_id)
            return b""
        return b"" if skip_special_tokens and token_id in self.special_ids else data

    def id_to_piece(self, token_id: int) -> str:
        """The piece as spelled in the tokenizer file, such as "▁Hello" or "<0x0A>"."""
        try:
            return self._vocabulary.pieces[token_id]
        except KeyError:
            raise self._unknown(token_id) from None

    def _bos(self) -> int:
        if self.bos_token_id is None:
            raise ValueError(f"BOS is requested, but {self.path} and the files beside it specify none")
        return self.bos_token_id

    def _unknown(self, token_id: int) -> ValueError:
        return ValueError(f"token id {token_id} is not in {self.path}; legal: 0 to {self.vocab_size - 1}")


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise TypeError(f"text must be str, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(f"text is not valid Unicode: lone surrogate U+{code:04X} at index {error.start}") from None
