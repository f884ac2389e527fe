"""A checkpoint's own chat template: rendered in a sandbox; special pieces become ids, forged ones are refused."""

from __future__ import annotations

import itertools
import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from fastllama.io.chat import markers
from fastllama.io.chat.messages import (
    CONTINUED,
    Markers,
    Message,
    Tags,
    check_messages,
    forged,
    without_markers,
    wrong_last,
)
from fastllama.io.chat.whole import TAGS, special_inside, turns_of, without_special
from fastllama.io.tokenizer import Tokenizer

_LOG = logging.getLogger("fastllama")
_ROLE = re.compile(r"[^\W\d_][\w .\-]*")
_BETWEEN_TAGS = re.compile(f"({'|'.join(map(re.escape, TAGS))})")


class ChatTemplate:
    """A jinja2 template and the tokenizer that encodes its output.

    `encode` gives the ids of transformers' `apply_chat_template(messages, add_generation_prompt=True)`, or of
    `continue_final_message=True`, and raises where a content would pose as another role, or a message would be dropped.
    """

    def __init__(self, tokenizer: Tokenizer, source: str, file: str) -> None:
        """file: the template's path, for errors. Raises CheckpointError for a broken template."""
        self.tokenizer, self.source, self.file = tokenizer, source, file
        self._undefined: set[str] = set()
        self.findings = markers.examine(self.render, tokenizer)
        if self._undefined:
            names = ", ".join(map(repr, sorted(self._undefined)))
            _LOG.warning("%s: the chat template prints %s, undefined here, as nothing", file, names)

    def render(self, messages: Sequence[Message], *, asks: bool = True) -> str:
        """The prompt for the next answer; without `asks`, without the header of that answer."""
        from fastllama.io.chat.sandbox import render

        variables: dict[str, Any] = {"messages": [dict(message) for message in messages]}
        variables |= {"add_generation_prompt": asks, "tools": None, "documents": None, **self.tokenizer.special_tokens}
        characters = sum(len(message["role"]) + len(message["content"]) for message in messages)
        text, undefined = render(self.source, self.file, variables, characters)
        self._undefined |= undefined
        return text

    def render_continued(self, messages: Sequence[Message]) -> str:
        """The text up to the end of the last content, cut as by transformers: blanks at its end stay if rendered.

        Raises ValueError where the template changed that content.
        """
        *before, last = messages
        contents = "".join(message["content"] for message in messages)
        numbers = itertools.count(len(messages))
        mark = next(each for each in map(markers.placeholder, numbers) if each not in contents + self.source)
        text = self.render([*before, {"role": last["role"], "content": f"{last['content']}{mark} "}], asks=False)
        head, found, tail = text.rpartition(mark)
        if not tail.startswith(" "):  # the template strips blanks at the end of a content
            head = head.rstrip()
        if not found or not head.rstrip().endswith(last["content"].strip()):
            raise ValueError(
                f"messages[{len(before)}], which continue_final_message=True continues, is not found again in what the "
                f"chat template of {self.file} writes; legal: a content that it does not change"
            )
        return head

    def encode(self, messages: Sequence[Message], tags: Tags, continues: bool) -> list[int]:
        """Token ids of a conversation; the template decides which roles are legal.

        Raises ValueError with the template's own message where it rejects the conversation, and naming messages[i] for
        a marker in a content (see markers.py), for one that content and template would form together, and for a message
        that the template leaves out silently. CheckpointError where the template fails.
        """
        messages = check_messages(messages)
        for index, message in enumerate(messages):
            self._check_role(index, message["role"])
        if continues != (messages[-1]["role"] == "assistant"):
            raise wrong_last(messages, CONTINUED if continues else "one that is answered")
        messages = without_markers(messages, self.findings.markers, tags)
        render = self.render_continued if continues else self.render
        text = render(messages)
        # The same conversation with harmless contents: a marker that it lacks comes from a content.
        harmless = [_harmless(index, message) for index, message in enumerate(messages)]
        own = render(harmless)
        for index, message in enumerate(messages):
            if message["content"].strip() and self._is_left_out(index, harmless, own, render):
                raise ValueError(
                    f"messages[{index}] has role {message['role']!r}, and the chat template of {self.file} "
                    "leaves it out; legal: roles that the template writes"
                )
        ids = self.tokenizer.encode_template(text)
        expected = self._marks(own, self.tokenizer.encode_template(own))
        if self._marks(text, ids) != expected:
            for index, message in enumerate(messages):
                alone = render([*harmless[:index], message, *harmless[index + 1 :]])
                more = self._marks(alone, self.tokenizer.encode_template(alone)) - expected
                for marker in more:
                    raise forged(index, marker)
            raise ValueError("messages together form special tags of the chat template, which would pose as a role")
        return ids

    def encode_whole(self, text: str, tags: Tags) -> list[int] | None:
        """Token ids of a text that is a whole prompt of this template's "[INST]" (whole.py), None of any other."""
        turns = turns_of(text)
        if turns is None or TAGS[0] not in self.findings.markers.anywhere:
            return None
        bos, eos = (self.tokenizer.special_tokens.get(name, "") for name in ("bos_token", "eos_token"))
        found = self.findings.markers
        special = Markers((piece for piece in found.anywhere if piece not in TAGS), found.line_start)
        own = whole = ""
        for index, turn in enumerate(turns):
            head = eos * (index > 0) + bos * turn.begins
            whole += head + without_special(turn.text, special, tags)
            own += head + "".join(part if part in TAGS else " q0z " for part in _BETWEEN_TAGS.split(turn.text))
        ids = self.tokenizer.encode_template(whole)
        # A marker that the tags alone do not produce comes from a text between them.
        for marker in self._marks(whole, ids) - self._marks(own, self.tokenizer.encode_template(own)):
            raise special_inside(marker)
        return ids

    def _marks(self, text: str, ids: Sequence[int]) -> Counter[str]:
        """Counts of the markers of a rendering: special ids and texts."""
        found = Counter(self.tokenizer.id_to_piece(i) for i in ids if i in self.findings.guarded_ids)
        return found + Counter(self.findings.markers.all(text))

    def _is_left_out(
        self, index: int, harmless: Sequence[Message], own: str, render: Callable[[Sequence[Message]], str]
    ) -> bool:
        """Whether a rendering does not depend on the content of a message."""
        if markers.placeholder(index) in own.casefold():
            return False
        other: Message = {"role": harmless[index]["role"], "content": "another text"}
        return render([*harmless[:index], other, *harmless[index + 1 :]]) == own

    def _check_role(self, index: int, role: str) -> None:
        """A role must be a word that names no special token, since a template may enclose it in brackets."""
        legal = "legal: a word, such as 'system', 'user', 'assistant'"
        if not _ROLE.fullmatch(role):
            raise ValueError(f"messages[{index}] has role {role!r}; {legal}")
        for piece in () if role in ("system", "user", "assistant") else self._control_pieces():
            if re.sub(r"^\W+|\W+$", "", piece) == role:
                raise ValueError(
                    f"messages[{index}] has role {role!r}, which names the special token {piece!r}; {legal}"
                )

    def _control_pieces(self) -> list[str]:
        ends = {self.tokenizer.id_to_piece(i) for i in self.findings.stop_token_ids}
        return sorted(ends | set(self.tokenizer.special_tokens.values()))


def _harmless(index: int, message: Message) -> Message:
    content = markers.placeholder(index) if message["content"].strip() else message["content"]
    return {"role": message["role"], "content": content}
