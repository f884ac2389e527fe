"""Where a growing text reaches one of its stop strings, in time that does not depend on how many there are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from fastllama.io.tokenizer import Tokenizer
from fastllama.runtime.params import SamplingParams

_FIRST_MARK = 0x100000  # of a private plane of Unicode: stands for a special token where stop strings are sought
_END = ""  # the key, in a node of a trie, of the string that ends there; all others are letters
Trie = dict[str, Any]  # letter -> Trie


def trie_of(strings: Iterable[str]) -> Trie:
    """The strings by their letters."""
    root: Trie = {}
    for string in strings:
        node = root
        for letter in string:
            node = node[letter] if letter in node else node.setdefault(letter, {})
        node[_END] = string
    return root


class StopStrings:
    """The stop strings of a request, as they are sought in its text.

    A special token ends a text too where a stop string spells it ("<|im_end|>"), although it shows none: there it is
    marked by one private character, which `shown` takes out again.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        special = sorted(tokenizer.special_ids) if params.stop and params.skip_special_tokens else []
        spelled = {i: tokenizer.token_bytes(i, skip_special_tokens=False).decode("utf-8", "replace") for i in special}
        joined = "\n".join(params.stop)  # one quick look, for most special tokens are in none
        spelled = {i: text for i, text in spelled.items() if text and text in joined}
        spelled = {i: text for i, text in spelled.items() if any(text in stop for stop in params.stop)}
        self.marks = {i: chr(_FIRST_MARK + n) for n, i in enumerate(spelled)}  # by token id
        self.given = {stop: stop for stop in params.stop}  # by how it is sought
        longest_first = sorted(spelled, key=lambda i: -len(spelled[i]))
        for stop in params.stop:
            marked = stop
            for i in longest_first:
                marked = marked.replace(spelled[i], self.marks[i])
            self.given[marked] = stop
        self.trie = trie_of(self.given)
        self._no_marks = dict.fromkeys(map(ord, self.marks.values()))

    def shown(self, text: str) -> str:
        """The text without marks."""
        return text.translate(self._no_marks) if self.marks else text


_KNOWN: WeakKeyDictionary[Tokenizer, WeakValueDictionary[tuple[Any, ...], StopStrings]] = WeakKeyDictionary()


def stop_strings(tokenizer: Tokenizer, params: SamplingParams) -> StopStrings:
    """The stop strings of a request, shared by all that have the same: of 2000 strings they take 8 MB."""
    known = _KNOWN.setdefault(tokenizer, WeakValueDictionary())
    key = params.stop, params.skip_special_tokens
    found = known.get(key)
    if found is None:
        found = known[key] = StopStrings(tokenizer, params)
    return found


class StopSearch:
    """The search for stop strings in one text, of which it holds the end that may begin one.

    before: text ahead of all that is pushed, to be searched with the first of it.
    """

    def __init__(self, stops: StopStrings, before: str = "") -> None:
        self.stops = stops
        self._before = before
        self._held = ""
        self._begun: list[tuple[int, Trie]] = []  # where in `_held` a stop string may begin, and how far it has come

    @property
    def held(self) -> str:
        """The text that was not released."""
        return self.stops.shown(self._before + self._held)

    def push(self, text: str, *, may_stop: bool) -> tuple[str, str | None]:
        """Add text: what is certain to come before any stop string, and the one that is reached first, as it was given.

        The first is the first to be complete, the longest of those: how the text is divided does not matter.
        may_stop: False goes on behind those that this text completes.
        """
        text, self._before = self._before + text, ""
        held = self._held + text
        for place, letter in enumerate(text, len(self._held)):
            going = [*self._begun, (place, self.stops.trie)]
            self._begun = [(start, node[letter]) for start, node in going if letter in node]
            for start, node in self._begun if may_stop else ():
                if _END in node:
                    self._held, self._begun = "", []
                    return self.stops.shown(held[:start]), self.stops.given[node[_END]]
        certain = next((start for start, node in self._begun if len(node) > (_END in node)), len(held))
        self._held = held[certain:]
        self._begun = [(start - certain, node) for start, node in self._begun]
        return self.stops.shown(held[:certain]), None
