"""Banned strings, as the token sequences that spell them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from weakref import WeakKeyDictionary

from fastllama.errors import brief
from fastllama.io.tokenizer import Tokenizer
from fastllama.io.tokenizer.base import ANCHOR

_KEPT = 32  # lists of words cached per tokenizer


class BadWords:
    """Token sequences that must not be generated.

    single: sequences of one token. num_before: length of the longest sequence, less its last token.
    """

    def __init__(self, sequences: Iterable[Sequence[int]]) -> None:
        self.single: set[int] = set()
        self._longer: dict[int, dict[tuple[int, ...], set[int]]] = {}  # length of a prefix -> prefix -> last tokens
        for *first, last in sequences:
            if first:
                self._longer.setdefault(len(first), {}).setdefault(tuple(first), set()).add(last)
            else:
                self.single.add(last)
        self.num_before = max(self._longer, default=0)

    def completing(self, generated_ids: Sequence[int]) -> set[int]:
        """Returns the tokens that would complete a longer sequence after these generated ids."""
        found: set[int] = set()
        for length, lasts in self._longer.items():
            found |= lasts.get(tuple(generated_ids[-length:]), set())
        return found


_KNOWN: WeakKeyDictionary[Tokenizer, dict[tuple[str, ...], BadWords]] = WeakKeyDictionary()


def bad_words(tokenizer: Tokenizer, words: tuple[str, ...]) -> BadWords:
    """Returns the words as token sequences, cached per tokenizer. Raises what `token_sequences` raises."""
    known = _KNOWN.setdefault(tokenizer, {})
    found = known.get(words) or BadWords(token_sequences(tokenizer, words))
    known[words] = found
    while len(known) > _KEPT:
        known.pop(next(iter(known)), None)
    return found


def token_sequences(tokenizer: Tokenizer, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
    """Returns the token ids of each word inside a text, with and without a leading space, without duplicates.

    As in vLLM, other tokenizations of a word and its inflections are not included. Raises ValueError for a word without
    token ids.
    """
    sequences: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.lstrip(" ")
        texts = (bare, f" {bare}") if bare else (word,)  # a word of spaces only
        found = [ids for text in texts if (ids := _inside(tokenizer, text))]
        if not found:
            raise ValueError(f"bad_words holds {brief(word)}; legal: strings to which {tokenizer.path} gives token ids")
        sequences.update(dict.fromkeys(found))
    return tuple(sequences)


def _inside(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Encodes a text in mid-text position, without the space that some tokenizers put before a whole text."""
    if not tokenizer.adds_leading_space:
        return tuple(tokenizer.encode(text, bos=False))
    return tuple(tokenizer.encode(ANCHOR + text, bos=False)[len(tokenizer.encode(ANCHOR, bos=False)) :])
