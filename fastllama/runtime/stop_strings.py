"""Incremental search for stop strings in generated text, in time independent of how many there are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from fastllama.io.tokenizer import Tokenizer
from fastllama.runtime.params import SamplingParams

_FIRST_MARK = 0x100000  # in a Unicode private-use plane: replaces a special token during the search
_END = ""  # the key, in a trie node, of the string that ends there; all others are characters
Trie = dict[str, Any]  # character -> Trie


def trie_of(strings: Iterable[str]) -> Trie:
    """Builds a trie of the strings, keyed by character."""
    root: Trie = {}
    for string in strings:
        node = root
        for letter in string:
            node = node[letter] if letter in node else node.setdefault(letter, {})
        node[_END] = string
    return root


class StopStrings:
    """The stop strings of a request, prepared for the search.

    A special token stops a request whose stop string spells it ("<|im_end|>"), even though its text is hidden: the
    search sees it as one private-use character, which `shown` removes again.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        special = sorted(tokenizer.special_ids) if params.stop and params.skip_special_tokens else []
        spelled = {i: tokenizer.token_bytes(i, skip_special_tokens=False).decode("utf-8", "replace") for i in special}
        joined = "\n".join(params.stop)  # one quick test: most special tokens occur in no stop string
        spelled = {i: text for i, text in spelled.items() if text and text in joined}
        spelled = {i: text for i, text in spelled.items() if any(text in stop for stop in params.stop)}
        self.marks = {i: chr(_FIRST_MARK + n) for n, i in enumerate(spelled)}  # by token id
        self.given = {stop: stop for stop in params.stop}  # by the string that is searched for
        longest_first = sorted(spelled, key=lambda i: -len(spelled[i]))
        for stop in params.stop:
            marked = stop
            for i in longest_first:
                marked = marked.replace(spelled[i], self.marks[i])
            self.given[marked] = stop
        self.trie = trie_of(self.given)
        self._no_marks = dict.fromkeys(map(ord, self.marks.values()))

    def shown(self, text: str) -> str:
        """Returns the text without marks."""
        return text.translate(self._no_marks) if self.marks else text


_KNOWN: WeakKeyDictionary[Tokenizer, WeakValueDictionary[tuple[Any, ...], StopStrings]] = WeakKeyDictionary()


def stop_strings(tokenizer: Tokenizer, params: SamplingParams) -> StopStrings:
    """Returns the stop strings of a request, shared by requests with the same ones: 2000 strings take 8 MB."""
    known = _KNOWN.setdefault(tokenizer, WeakValueDictionary())
    key = params.stop, params.skip_special_tokens
    found = known.get(key)
    if found is None:
        found = known[key] = StopStrings(tokenizer, params)
    return found


class StopSearch:
    """Searches one growing text for stop strings; holds back its end while that may be the start of one.

    before: text that precedes everything pushed, searched together with the first push.
    """

    def __init__(self, stops: StopStrings, before: str = "") -> None:
        self.stops = stops
        self._before = before
        self._held = ""
        self._begun: list[tuple[int, Trie]] = []  # start in `_held` of each candidate, and its trie node

    @property
    def held(self) -> str:
        """The text held back so far."""
        return self.stops.shown(self._before + self._held)

    def push(self, text: str, *, may_stop: bool) -> tuple[str, str | None]:
        """Adds text; returns the text now released and the completed stop string as the caller gave it, or None.

        The stop string completed first wins, the longest where several are; how the text is divided does not matter.
        may_stop: False ignores stop strings that this text completes.
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
