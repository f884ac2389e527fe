"""Added tokens: pieces that are matched in a text before the vocabulary's own algorithm runs."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

_SPACES = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
_WORD = ("L", "M", "Nd", "Nl", "Pc")  # Unicode categories of letters, marks, digits and connectors
_JOINERS = "\u200c\u200d"


class AddedPiece(NamedTuple):
    """An added token as the files declare it.

    Attributes:
        content: the text that becomes this token.
        token_id: the id in the files, None where they specify none.
        lstrip, rstrip: the token absorbs the white space on its left, on its right.
        single_word: the token is not matched inside words.
        normalized: the token is matched in the normalized text, after the tokens that are not normalized.
        special: decoding may skip it.
    """

    content: str
    token_id: int | None = None
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False
    special: bool = True


def number(pieces: Iterable[AddedPiece], vocabulary: Mapping[str, int]) -> dict[int, AddedPiece]:
    """Ids of added tokens: the id of the same piece in the vocabulary, else the file's if it is free, else the next.

    transformers 5 takes the next one even where the file leaves a gap; its version 4, llama.cpp and the model's
    embeddings follow the file.
    """
    ids = dict(vocabulary)
    taken = set(ids.values())
    found: dict[int, AddedPiece] = {}
    for piece in pieces:
        if piece.content not in ids:
            free = max(len(vocabulary), max(taken, default=-1) + 1)
            wanted = piece.token_id
            ids[piece.content] = free if wanted is None or wanted in taken or wanted < len(vocabulary) else wanted
            taken.add(ids[piece.content])
        found[ids[piece.content]] = piece
    return found


class AddedMatcher:
    """Finds added tokens in a text: the leftmost first, the longest of those, as in the package tokenizers."""

    def __init__(self, pieces: Mapping[int, AddedPiece]) -> None:
        self._pieces = {piece.content: (token_id, piece) for token_id, piece in pieces.items() if piece.content}
        self._passes = [
            _pattern(text for text, (_, piece) in self._pieces.items() if piece.normalized is normalized)
            for normalized in (False, True)
        ]

    def split(self, text: str) -> Iterator[tuple[int | None, str, bool]]:
        """The text in non-empty parts: an added token's id and the text it covers, or None and the text between.

        The third value is whether the part begins the text.
        """
        first, second = self._passes
        for token_id, start, stop in self._matches(text, first):
            if token_id is not None:
                yield token_id, text[start:stop], start == 0
            else:
                part = text[start:stop]
                for inner_id, inner_start, inner_stop in self._matches(part, second):
                    yield inner_id, part[inner_start:inner_stop], start + inner_start == 0

    def _matches(self, text: str, pattern: re.Pattern[str] | None) -> Iterator[tuple[int | None, int, int]]:
        end = 0
        for match in pattern.finditer(text) if pattern else ():
            token_id, piece = self._pieces[match[0]]
            start, stop = match.span()
            if piece.single_word and (_is_word(text[start - 1 : start]) or _is_word(text[stop : stop + 1])):
                continue
            if piece.lstrip:
                while start > end and text[start - 1] in _SPACES:
                    start -= 1
            if piece.rstrip:
                while stop < len(text) and text[stop] in _SPACES:
                    stop += 1
            if start > end:
                yield None, end, start
            yield token_id, start, stop
            end = stop
        if end < len(text):
            yield None, end, len(text)


def _pattern(texts: Iterable[str]) -> re.Pattern[str] | None:
    longest = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest))) if longest else None


def _is_word(letter: str) -> bool:
    return bool(letter) and (letter in _JOINERS or unicodedata.category(letter).startswith(_WORD))
