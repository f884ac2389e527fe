"""The messages of a conversation: their types, the order of roles, and text that would pose as another role."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypedDict

from fastllama.errors import brief

Tags = Literal["refuse", "escape"]
CONTINUED = "'assistant' with continue_final_message=True"  # the role of a last message that goes on
_OPENING = re.compile(r"<<|[<\[({]")
_BREAKS = r"\n\r\v\f\x1c-\x1e\x85\u2028\u2029"
_LINE_START = rf"(?:\A|(?<=[{_BREAKS}]))[^\S{_BREAKS}]*"


class Message(TypedDict):
    """One message of a conversation; role: "system", "user", "assistant", or another that the template knows."""

    role: str
    content: str


class Markers:
    """Texts by which a model tells roles apart, and which no content may hold: `anywhere`, or where a line begins."""

    def __init__(self, anywhere: Iterable[str], line_start: Iterable[str] = ()) -> None:
        """Blank texts and duplicates are left out; a longer text is found before one that it begins with."""
        self.anywhere = _longest_first(anywhere)
        self.line_start = _longest_first(text for text in line_start if text not in self.anywhere)
        labels = _any_of(self.line_start)
        # Two searches: one that must look for the start of a line everywhere would slow down the other tenfold.
        self._patterns = [re.compile(_any_of(self.anywhere)), re.compile(f"{_LINE_START}{labels}")]

    def find(self, text: str) -> str | None:
        """The first marker in a text."""
        found = [match for pattern in self._patterns if (match := pattern.search(text))]
        return min(found, key=lambda match: match.start())[0].strip() if found else None

    def all(self, text: str) -> list[str]:
        """Every marker in a text."""
        return [match[0].strip() for pattern in self._patterns for match in pattern.finditer(text)]

    def split(self, text: str) -> list[str]:
        """The parts of a text between the markers that may stand anywhere."""
        return self._patterns[0].split(text)

    def escape(self, text: str) -> str:
        """A backslash in each marker: behind its opening bracket, or before the last letter where it has none.

        What takes another round to escape (markers that overlap) gets one; ValueError if a marker cannot be escaped.
        """
        for _ in range(8):
            if self.find(text) is None:
                return text
            for pattern in self._patterns:
                text = pattern.sub(lambda match: _escaped(match[0]), text)
        raise ValueError(f"holds {self.find(text)!r}, which a backslash cannot take apart")


def check_messages(messages: Sequence[Message]) -> list[Message]:
    """The messages as plain dicts.

    TypeError for what is not a list of mappings of `role` and `content`, both text; ValueError for no message, and for
    text that is not valid Unicode.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise TypeError(f"messages is {brief(messages)}; legal: a list of mappings of 'role' and 'content'")
    checked = [_checked(index, message) for index, message in enumerate(messages)]
    if not checked:
        raise ValueError("messages is empty; legal: at least one message, the last from the user")
    return checked


def check_turns(messages: Sequence[Message], continues: bool) -> None:
    """ValueError unless user and assistant take turns, after an optional system message.

    continues: the assistant has the last turn, which goes on; else the user has it.
    """
    system = messages[0]["role"] == "system"
    for index, message in enumerate(messages):
        expected = "assistant" if (index - system) % 2 else "user"
        legal = ("system", "user") if index == 0 else (expected,)
        if message["role"] not in legal:
            raise ValueError(
                f"messages[{index}] has role {message['role']!r}; legal here: {' or '.join(map(repr, legal))} "
                "(user and assistant in turn, after an optional system message)"
            )
    if messages[-1]["role"] != ("assistant" if continues else "user"):
        raise wrong_last(messages, CONTINUED if continues else "'user'")


def wrong_last(messages: Sequence[Message], legal: str) -> ValueError:
    """The error for a last message of a role that cannot have it."""
    return ValueError(f"messages[{len(messages) - 1}], the last, has role {messages[-1]['role']!r}; legal: {legal}")


def without_markers(messages: Sequence[Message], markers: Markers, tags: Tags) -> list[Message]:
    """The messages with every marker in their contents escaped; ValueError for the first one if `tags` is "refuse"."""
    safe: list[Message] = []
    for index, message in enumerate(messages):
        content = message["content"]
        found = markers.find(content)
        if found is not None and tags == "refuse":
            raise forged(index, found)
        try:
            safe.append({"role": message["role"], "content": markers.escape(content)})
        except ValueError as error:
            raise ValueError(f"messages[{index}] {error}") from None
    return safe


def forged(index: int, marker: str) -> ValueError:
    """The error for a content that would pose as another role."""
    return ValueError(
        f"messages[{index}] contains the special tag {marker!r}, which would pose as another role; "
        "remove it or pass tags='escape'"
    )


def _checked(index: int, message: Any) -> Message:
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        raise TypeError(f"messages[{index}] is {brief(message)}; legal: a mapping of 'role' and 'content'")
    for key in ("role", "content"):
        if not isinstance(message[key], str):
            raise TypeError(f"messages[{index}][{key!r}] must be str, got {type(message[key]).__name__}")
        try:
            message[key].encode()
        except UnicodeEncodeError as error:
            code = f"U+{ord(error.object[error.start]):04X} at index {error.start}"
            raise ValueError(f"messages[{index}][{key!r}] is not valid Unicode: lone surrogate {code}") from None
    return {"role": "".join(message["role"]), "content": "".join(message["content"])}


def _escaped(marker: str) -> str:
    opening = _OPENING.search(marker)
    cut = opening.end() if opening else len(marker) - 1
    return f"{marker[:cut]}\\{marker[cut:]}"


def _any_of(texts: Sequence[str]) -> str:
    return f"(?:{'|'.join(map(re.escape, texts))})" if texts else "(?!)"


def _longest_first(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({text for text in texts if text.strip()}, key=lambda text: (-len(text), text)))
