"""Strings that must not be generated, as the token sequences that spell them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fastllama.io.tokenizer import Tokenizer
from fastllama.io.tokenizer.base import ANCHOR


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
            raise ValueError(f"bad_words holds {word!r}; legal: strings to which {tokenizer.path} gives token ids")
        sequences.update(dict.fromkeys(found))
    return tuple(sequences)


def banned_next(sequences: Sequence[Sequence[int]], generated_ids: Sequence[int]) -> set[int]:
    """The token ids that would complete one of the sequences behind these generated ids."""
    length = len(generated_ids)
    return {last for *first, last in sequences if list(generated_ids[length - len(first) :]) == first}


def _inside(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Ids of a text that follows another, so that none gets the space which a tokenizer puts before a whole text."""
    if not tokenizer.adds_leading_space:
        return tuple(tokenizer.encode(text, bos=False))
    return tuple(tokenizer.encode(ANCHOR + text, bos=False)[len(tokenizer.encode(ANCHOR, bos=False)) :])
