"""Where a growing text reaches one of its stop strings, in time that does not depend on how many there are."""

from __future__ import annotations

import functools
from collections import deque

from fastllama.io.tokenizer import Tokenizer
from fastllama.runtime.params import SamplingParams

_FIRST_MARK = 0x100000  # of a private plane of Unicode: stands for a special token where stop strings are sought


class StringAutomaton:
    """Finds strings in a text that comes in pieces (Aho and Corasick 1975): one step for each character.

    A state is the longest end of the text that begins one of the strings; 0 is none of it.
    """

    def __init__(self, strings: tuple[str, ...]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._shorter = [0]  # the state of the next shorter end of the text
        self.held = [0]  # by state: characters at the end of the text that may become one of the strings
        self.found: list[str | None] = [None]  # by state: the longest string that the text ends with
        for string in strings:
            state = 0
            for letter in string:
                state = self._next[state].setdefault(letter, len(self._next))
                if state == len(self._next):
                    self._next.append({})
                    self._shorter.append(0)
                    self.held.append(0)
                    self.found.append(None)
            self.found[state] = string
        self._link()

    def step(self, state: int, letter: str) -> int:
        """The state behind another letter."""
        while letter not in self._next[state]:
            if not state:
                return 0
            state = self._shorter[state]
        return self._next[state][letter]

    def _link(self) -> None:
        """Fill what follows from shorter ends, which come first in the order of their length."""
        todo = deque((state, letter, 0, 1) for letter, state in self._next[0].items())
        while todo:
            state, letter, parent, length = todo.popleft()
            self._shorter[state] = shorter = self.step(self._shorter[parent], letter) if parent else 0
            self.held[state] = length if self._next[state] else self.held[shorter]
            self.found[state] = self.found[state] or self.found[shorter]
            todo.extend((child, after, state, length + 1) for after, child in self._next[state].items())


_automaton = functools.lru_cache(maxsize=32)(StringAutomaton)  # one for the samples of a request, and for its like


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
        self.automaton = _automaton(tuple(self.given))
        self._no_marks = dict.fromkeys(map(ord, self.marks.values()))

    def shown(self, text: str) -> str:
        """The text without marks."""
        return text.translate(self._no_marks) if self.marks else text
