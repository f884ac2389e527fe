"""Strings that must not be generated, as the token sequences that spell them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from weakref import WeakKeyDictionary

from fastllama.errors import brief
from fastllama.io.tokenizer import Tokenizer
from fastllama.io.tokenizer.base import ANCHOR

_KEPT = 32  # lists of words that are remembered for a tokenizer


class BadWords:
    """Token sequences that must not be completed.

    single: those of one token, which are never generated. num_before: tokens before the last of the longest.
    """

    def __init__(self, sequences: Iterable[Sequence[int]]) -> None:
        self.single: set[int] = set()
        self._longer: dict[int, dict[tuple[int, ...], set[int]]] = {}  # length of a beginning -> it -> last tokens
        for *first, last in sequences:
            if first:
                self._longer.setdefault(len(first), {}).setdefault(tuple(first), set()).add(last)
            else:
                self.single.add(last)
        self.num_before = max(self._longer, default=0)

    def completing(self, generated_ids: Sequence[int]) -> set[int]:
        """The tokens that would complete a sequence of several behind these generated ids."""
        found: set[int] = set()
        for length, lasts in self._longer.items():
            found |= lasts.get(tuple(generated_ids[-length:]), set())
        return found


_KNOWN: WeakKeyDictionary[Tokenizer, dict[tuple[str, ...], BadWords]] = WeakKeyDictionary()


def bad_words(tokenizer: Tokenizer, words: tuple[str, ...]) -> BadWords:
    """The words as a tokenizer spells them, remembered for requests that have the same. Raises as `token_sequences`."""
    known = _KNOWN.setdefault(tokenizer, {})
    found = known.get(words) or BadWords(token_sequences(tokenizer, words))
    known[words] = found
    while len(known) > _KEPT:
        known.pop(next(iter(known)), None)
    return found


def token_sequences(tokenizer: Tokenizer, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
    """The token ids that each word is encoded to inside a text, with and without a space in front, each once.

    Other ways to spell a word, in smaller pieces, are not among them, nor are its inflections, as in vLLM. Raises
    ValueError for a word without token ids.
    """
    sequences: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.lstrip(" ")
        texts = (bare, f" {bare}") if bare else (word,)  # a word of spaces is that
        found = [ids for text in texts if (ids := _inside(tokenizer, text))]
        if not found:
            raise ValueError(f"bad_words holds {brief(word)}; legal: strings to which {tokenizer.path} gives token ids")
        sequences.update(dict.fromkeys(found))
    return tuple(sequences)


def _inside(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Ids of a text that follows another, so that none gets the space which a tokenizer puts before a whole text."""
    if not tokenizer.adds_leading_space:
        return tuple(tokenizer.encode(text, bos=False))
    return tuple(tokenizer.encode(ANCHOR + text, bos=False)[len(tokenizer.encode(ANCHOR, bos=False)) :])
