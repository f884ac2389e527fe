"""The messages of a conversation: their types, the order of roles, and text that would pose as another role."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypedDict

from fastllama.errors import brief

Tags = Literal["refuse", "escape"]
CONTINUED = "'assistant' with continue_final_message=True"  # the role of a last message to be continued
_OPENING = re.compile(r"<<|[<\[({]")
_BREAKS = r"\n\r\v\f\x1c-\x1e\x85\u2028\u2029"
_LINE_START = rf"(?:\A|(?<=[{_BREAKS}]))[^\S{_BREAKS}]*"


class Message(TypedDict):
    """One message of a conversation; role: "system", "user", "assistant", or another that the template accepts."""

    role: str
    content: str


class Markers:
    """Texts that separate roles, and that no content may contain: `anywhere`, or at the start of a line."""

    def __init__(self, anywhere: Iterable[str], line_start: Iterable[str] = ()) -> None:
        """Drops blank texts and duplicates; a longer text is matched before its prefixes."""
        self.anywhere = _longest_first(anywhere)
        self.line_start = _longest_first(text for text in line_start if text not in self.anywhere)
        labels = _any_of(self.line_start)
        # Two patterns: one alone would look for the start of a line everywhere, ten times slower.
        self._patterns = [re.compile(_any_of(self.anywhere)), re.compile(f"{_LINE_START}{labels}")]

    def find(self, text: str) -> str | None:
        """The first marker in a text."""
        found = [match for pattern in self._patterns if (match := pattern.search(text))]
        return min(found, key=lambda match: match.start())[0].strip() if found else None

    def all(self, text: str) -> list[str]:
        """Every marker in a text."""
        return [match[0].strip() for pattern in self._patterns for match in pattern.finditer(text)]

    def split(self, text: str) -> list[str]:
        """The parts of a text between markers of the `anywhere` kind."""
        return self._patterns[0].split(text)

    def escape(self, text: str) -> str:
        """Insert a backslash into each marker: after its opening bracket, or before its last letter if it has none.

        Overlapping markers take several rounds. ValueError if a marker cannot be escaped.
        """
        for _ in range(8):
            if self.find(text) is None:
                return text
            for pattern in self._patterns:
                text = pattern.sub(lambda match: _escaped(match[0]), text)
        raise ValueError(f"holds {self.find(text)!r}, which a backslash cannot escape")


def check_messages(messages: Sequence[Message]) -> list[Message]:
    """The messages as plain dicts.

    TypeError unless it is a list of mappings of `role` and `content`, both text; ValueError for an empty list and for
    invalid Unicode.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise TypeError(f"messages is {brief(messages)}; legal: a list of mappings of 'role' and 'content'")
    checked = [_checked(index, message) for index, message in enumerate(messages)]
    if not checked:
        raise ValueError("messages is empty; legal: at least one message, the last from the user")
    return checked


def check_turns(messages: Sequence[Message], continues: bool) -> None:
    """Raise ValueError unless user and assistant alternate, after an optional system message.

    continues: the last turn is the assistant's, to be continued; else it is the user's.
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
    """The error for a last message of an illegal role."""
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
