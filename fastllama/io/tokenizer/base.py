"""The face of all tokenizers: text to token ids and back, whatever file the vocabulary lies in."""

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
CONTROL_PIECES = ("<s>", "</s>", "<unk>")  # of a SentencePiece vocabulary: plain text where a text spells them
INFILLING_PIECES = tuple(f"{SPACE}<{name}>" for name in _INFILLING)
# Where text would spell an infilling piece (a space or the start, then "<PRE>"): between its "<" and the rest.
_INSIDE_INFILLING_TAG = re.compile(rf"(?:(?<=\A<)|(?<=[ {SPACE}]<))(?=(?:{'|'.join(_INFILLING)})>)")
ANCHOR = "☺"  # as in Code Llama's reference: takes the leading space in place of the text that must not get it
_NORMALIZED = "A\uff21e\u0301\ufb01\xb2\xad\u200b\x07"  # of which Unicode's normal forms keep no character but A
_TAG = re.compile(r"<\|.*\|>", re.DOTALL)


class InfillingIds(NamedTuple):
    """Token ids of Code Llama's infilling pieces; generation of the middle ends with `end` (`▁<EOT>`)."""

    prefix: int
    suffix: int
    middle: int
    end: int


class Vocabulary(NamedTuple):
    """What each token id stands for: its piece as the file spells it and its UTF-8 bytes; special and added ids."""

    pieces: Mapping[int, str]
    text: Mapping[int, bytes]
    special: frozenset[int]
    added: frozenset[int] = frozenset()


class Frame(NamedTuple):
    """The ids that the files put before and behind a text: BOS, EOS or none."""

    before: Sequence[int] = ()
    after: Sequence[int] = ()


class Tokenizer(ABC):
    """Text to token ids and back, as transformers 5.23 does it on the same files.

    Every id stands for a string of bytes, so decoding is their concatenation, less the one leading space that
    encoding added, read as UTF-8 with U+FFFD for each invalid sequence (transformers marks each byte of it). Special
    ids (BOS, EOS, unknown, special added tokens, infilling) have no text unless shown.

    `encode` differs from transformers in two points, as Meta's reference does: `<s>`, `</s>`, `<unk>` and the
    infilling pieces of a SentencePiece vocabulary are plain text in it, and it swallows none of a text's leading
    spaces. So `decode(encode(text)) == text` for every valid text without an added token and without U+2581, which
    SentencePiece cannot tell from a space. `encode_template` differs in nothing.
    """

    # Whether white space can be in no token: beside added tokens that take it, or where normalization drops it.
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
        """`path`: the file it was read from; `bos`, `eos`, `pad`: token ids, None where the files name none."""
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
        """Ids of valid Unicode text, with the leading space where the files say so, not put between BOS and EOS.

        `template`: `<s>`, `</s>`, `<unk>` and infilling pieces become ids too.
        """

    def _encode_continuation(self, text: str) -> list[int]:
        """Ids of plain text without the leading space."""
        return self._encode_raw(ANCHOR + text)[len(self._encode_raw(ANCHOR)) :]

    def _encode_plain(self, text: str, *, continuation: bool = False) -> list[int]:
        """Checked text to ids, none of them an infilling piece even where the text spells one."""
        _check_text(text)
        head, *rest = _INSIDE_INFILLING_TAG.split(text) if self.infilling else [text]
        ids = self._encode_continuation(head) if continuation else self._encode_raw(head)
        for part in rest:
            ids += self._encode_continuation(part)
        return ids

    def encode(self, text: str, *, bos: bool | None = None) -> list[int]:
        """Token ids of `text`. Added tokens written in it become their ids; what else differs, the class tells.

        Args:
            text: any text.
            bos: None puts before and behind the text what the files say (add_bos_token, add_eos_token, or the
                post-processor of tokenizer.json). True puts one BOS before it, False nothing, and neither an EOS.

        Raises:
            TypeError: unless `text` is str.
            ValueError: for a lone surrogate, or where BOS is asked for and the files name none.
        """
        ids = self._encode_plain(text)
        if bos is None:
            return [*self._frame.before, *ids, *self._frame.after]
        return [self._bos(), *ids] if bos else ids

    def least_length(self, text: str) -> int:
        """A number of tokens that `encode` gives at the least, known without reading the text; 0 where none is."""
        if not self._keeps_text:
            return 0
        dropped = sum(map(text.count, " \t\n\r")) if self._may_drop_blanks else 0
        return (len(text) - dropped) // self._longest_piece

    @functools.cached_property
    def _keeps_text(self) -> bool:
        """Whether each character but white space is in some token: no normalization drops it, no unknown token."""
        single_bytes = {data for data in self._vocabulary.text.values() if len(data) == 1}
        return len(single_bytes) == 256 and _NORMALIZED in self._normalize(_NORMALIZED)

    @functools.cached_property
    def _longest_piece(self) -> int:
        """Bytes of the longest piece."""
        return max(map(len, self._vocabulary.text.values()))

    def _normalize(self, text: str) -> str:
        """What is divided into pieces; "" where that is not known."""
        return ""

    def encode_template(self, text: str) -> list[int]:
        """Token ids of a rendered chat template: special and added pieces in it become ids, none is put around it.

        Equals `tokenizer(text, add_special_tokens=False)` of transformers. Raises as `encode` does.
        """
        _check_text(text)
        return self._encode_raw(text, template=True)

    def special_pieces(self) -> frozenset[str]:
        """The texts that steer a model where `encode_template` reads them: what a chat message may not hold.

        All special pieces, and of the other added tokens those that the chat template spells or that look like
        "<|im_start|>".
        """
        template = self.chat_template or ""
        pieces = self._vocabulary.pieces
        plain = (pieces[token_id] for token_id in self._vocabulary.added - self.special_ids)
        spelled = (piece for piece in plain if _TAG.fullmatch(piece) or (piece in template and not piece.isspace()))
        return frozenset(spelled) | {pieces[token_id] for token_id in self.special_ids}

    def encode_infilling(self, prefix: str, suffix: str) -> list[int]:
        """Prompt that asks Code Llama for the text between two: BOS ▁<PRE> prefix ▁<SUF> suffix ▁<MID>.

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
        """UTF-8 bytes that an id adds to a text: part of a character for a byte piece, none for a skipped special.

        None also for an id below `vocab_size` to which the vocabulary gives no piece.
        """
        data = self._vocabulary.text.get(token_id)
        if data is None:
            if not 0 <= token_id < self.vocab_size:
                raise self._unknown(token_id)
            return b""
        return b"" if skip_special_tokens and token_id in self.special_ids else data

    def id_to_piece(self, token_id: int) -> str:
        """The piece as the tokenizer file spells it, such as "▁Hello" or "<0x0A>"."""
        try:
            return self._vocabulary.pieces[token_id]
        except KeyError:
            raise self._unknown(token_id) from None

    def _bos(self) -> int:
        if self.bos_token_id is None:
            raise ValueError(f"BOS is asked for, but {self.path} and the files beside it name none")
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
