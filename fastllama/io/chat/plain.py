"""Conversations as plain text, for models that were trained on no chat format."""

from __future__ import annotations

from collections.abc import Sequence

from fastllama.io.chat.messages import Markers, Message, Tags, check_messages, check_turns, without_markers
from fastllama.io.tokenizer import Tokenizer

STOP = "\nUser:"
_LABELS = {"system": "System:", "user": "User:", "assistant": "Assistant:"}


def encode(
    tokenizer: Tokenizer, special: Sequence[str], messages: Sequence[Message], tags: Tags, continues: bool
) -> list[int]:
    """Token ids of a conversation as labelled plain text, BOS by the tokenizer's rule.

    A single message is the prompt itself, as for `generate`. Several are "System: ...", an empty line, "User: ...",
    "Assistant: ..." in turn, each on lines of its own and stripped, and "Assistant:" last, unless the last message is
    to be continued (`continues`). No line of a content may begin with one of these labels; no content may contain the
    `special` pieces that this tokenizer encodes as ids in plain text.
    """
    messages = check_messages(messages)
    check_turns(messages, continues)
    alone = len(messages) == 1
    messages = without_markers(messages, Markers(special, () if alone else _LABELS.values()), tags)
    if alone:
        return tokenizer.encode(messages[0]["content"])
    lines = [f"{_LABELS[message['role']]} {message['content'].strip()}" for message in messages]
    if messages[0]["role"] == "system":
        lines[0] += "\n"
    if not continues:
        lines.append(_LABELS["assistant"])
    return tokenizer.encode("\n".join(lines).rstrip())
