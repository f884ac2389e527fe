"""Llama 2's chat format: a conversation to the token ids that the chat models were trained on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

from fastllama.errors import check_choice
from fastllama.io.tokenizer import Tokenizer

TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
_TAG = re.compile("|".join(map(re.escape, TAGS)))
_OPENING = re.compile(r"\[|<<")


class Message(TypedDict):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], *, tags: Literal["refuse", "escape"] = "refuse"
) -> list[int]:
    """Token ids that ask for the next answer: those of `chat_completion` in Meta's Llama 2 reference (generation.py).

    Each finished turn is BOS, "[INST] user [/INST] assistant ", EOS; the last is BOS, "[INST] user [/INST]". A system
    message is first put before the first user message, as "<<SYS>>\\nsystem\\n<</SYS>>\\n\\n"; only then are contents
    stripped. Each turn is encoded by itself, so it begins with SentencePiece's leading space. The chat template on
    Hugging Face gives the same ids, except that

    - a tokenizer.json with `prepend_scheme: first` leaves out that space after each BOS (the piece "[", not "▁[");
    - "<s>" and "</s>" inside contents become control ids there, and stay plain text here and in Meta's reference.

    Args:
        messages: an optional system message, then user and assistant in turn, the last from the user.
        tags: what to do with "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>" inside contents, which would let a text pose as
            another role. "refuse" raises ValueError; "escape" puts a backslash behind the opening brackets ("[\\INST]",
            "<<\\/SYS>>"), so that the text still reads, is no longer the tag, and can be put back.

    Raises:
        ValueError: naming the message's index, for a wrong order of roles or a refused tag.
        TypeError: for a message that is not a mapping of `role` and `content`, both text.
    """
    check_choice("tags", tags, ("refuse", "escape"))
    roles, contents = _checked(messages)
    contents = [_without_tags(index, content, tags) for index, content in enumerate(contents)]
    if roles[0] == "system":
        system, first, *rest = contents
        contents = [f"<<SYS>>\n{system}\n<</SYS>>\n\n{first}", *rest]
    *finished, last = [content.strip() for content in contents]
    ids: list[int] = []
    for user, assistant in zip(finished[::2], finished[1::2], strict=True):
        ids += tokenizer.encode(f"[INST] {user} [/INST] {assistant} ")
        ids.append(tokenizer.eos_token_id)
    return ids + tokenizer.encode(f"[INST] {last} [/INST]")


def _checked(messages: Sequence[Message]) -> tuple[list[str], list[str]]:
    """Roles and contents of a conversation that waits for an answer."""
    roles: list[str] = []
    contents: list[str] = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise TypeError(f"messages[{index}] is {message!r}; legal: a mapping of 'role' and 'content'")
        if not isinstance(message["content"], str):
            raise TypeError(f"messages[{index}]['content'] must be str, got {type(message['content']).__name__}")
        after_system = index - (roles[:1] == ["system"])
        expected = "assistant" if after_system % 2 else "user"
        legal = ("system", "user") if index == 0 else (expected,)
        if message["role"] not in legal:
            raise ValueError(
                f"messages[{index}] has role {message['role']!r}; legal here: {' or '.join(map(repr, legal))} "
                "(user and assistant in turn, after an optional system message)"
            )
        roles.append(message["role"])
        contents.append(message["content"])
    if not roles:
        raise ValueError("messages is empty; legal: at least one message, the last from the user")
    if roles[-1] != "user":
        raise ValueError(f"messages[{len(roles) - 1}], the last, has role {roles[-1]!r}; legal: 'user'")
    return roles, contents


def _without_tags(index: int, content: str, tags: str) -> str:
    if tags == "escape":
        return _TAG.sub(lambda tag: _OPENING.sub(r"\g<0>\\", tag[0]), content)
    found = _TAG.search(content)
    if found:
        raise ValueError(
            f"messages[{index}] contains the special tag {found[0]!r}, which would pose as another role; "
            "remove it or pass tags='escape'"
        )
    return content
