"""Encodes OpenAI's messages as a prompt: checks contents and the order of roles, returns token ids."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastllama.errors import brief, counted, shown
from fastllama.io.chat import Message
from fastllama.runtime.prompts import continues_message
from fastllama.serve.errors import ApiError, context_length_exceeded, invalid
from fastllama.serve.model import ServedModel
from fastllama.serve.wire import ChatMessage

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_FOR_TOOLS = ("tool", "function")
_LEFT_EMPTY = (
    "refusal",
    "annotations",
    "audio",
    "function_call",
    "tool_calls",
    "tool_call_id",
    "reasoning_content",
    "reasoning",
    "parsed",
    "provider_specific_fields",
)
_TYPES = (None, "text", "message")  # values of "type" that some clients send for a message
_NO_TOOLS = "Llama 2 was not trained to call tools"
_INDEX = re.compile(r"messages\[(\d{1,6})\]")


class ChatPrompt(NamedTuple):
    """The prompt of a conversation.

    continues_text: whether the answer continues the last message, which is the assistant's. stop: stop strings of the
    chat format.
    """

    token_ids: list[int]
    continues_text: bool
    stop: tuple[str, ...]


@dataclass
class ChatTurn:
    """Consecutive messages of one role; index: of the first of them."""

    index: int
    role: str
    contents: list[str]

    @property
    def content(self) -> str:
        """Its messages, separated by blank lines."""
        return "\n\n".join(filter(None, self.contents))


def encode_messages(messages: Sequence[ChatMessage], model: ServedModel) -> ChatPrompt:
    """Encodes a conversation.

    System messages come first, consecutive messages of one role are joined, and text that imitates another role is
    escaped; a single user message that is a whole `[INST]` prompt is encoded as such. A last message of the assistant
    is continued, unless it is blank, which is dropped. Raises ApiError for illegal messages, and, before tokenizing,
    for contents that cannot fit into the context.
    """
    turns = _turns(messages)
    if len(turns) >= model.max_model_len:  # a token or more each
        raise context_length_exceeded(model.max_model_len, f"messages takes {len(turns)} turns", "messages")
    check_fits("".join(turn.content for turn in turns), model, "messages")
    if len(turns) > 1 and turns[-1].role == "assistant" and not turns[-1].content.strip():
        turns.pop()  # nothing to continue
    continues = turns[-1].role == "assistant"
    chat: list[Message] = [{"role": turn.role, "content": turn.content} for turn in turns]
    ids = None
    try:
        if len(messages) == 1 and turns[0].role == "user":
            ids = model.chat_format.encode_whole(turns[0].content, tags="escape")
        if ids is None:
            ids = model.chat_format.encode(chat, tags="escape", continue_final_message=continues)
    except (ValueError, TypeError) as error:
        raise _refused(error, turns) from None
    goes_on = continues and continues_message(turns[-1].content, ids, model.tokenizer)
    return ChatPrompt(ids, goes_on, model.chat_format.stop_after(chat))


def check_fits(text: str, model: ServedModel, where: str) -> None:
    """Raise ApiError for a text too long for the context in any tokenization, without tokenizing it."""
    least = model.tokenizer.least_length(text)
    if least >= model.max_model_len:
        has = f"{counted(len(text), 'character')}, which are {counted(least, 'token')} or more"
        raise context_length_exceeded(model.max_model_len, f"{where} has {has}", where.split("[")[0])


def check_length(num_tokens: int, model: ServedModel, where: str) -> None:
    """Raise ApiError for a prompt that leaves no room in the context; where: "messages", "prompt" or "prompt[3]"."""
    if num_tokens >= model.max_model_len:
        has = f"{where} has {counted(num_tokens, 'token')}"
        raise context_length_exceeded(model.max_model_len, has, where.split("[")[0])


def _turns(messages: Sequence[ChatMessage]) -> list[ChatTurn]:
    if not messages:
        raise invalid("messages is empty; legal: at least one message", "messages")
    turns: list[ChatTurn] = []
    for index, message in enumerate(messages):
        role = _role(f"messages[{index}]", message.role)
        content = _content(f"messages[{index}]", message, role)
        if turns and turns[-1].role == role:
            turns[-1].contents.append(content)
        elif turns and role == "system":
            raise invalid(
                f"messages[{index}].role is {message.role!r} after other roles; legal: system messages come first",
                f"messages[{index}].role",
            )
        else:
            turns.append(ChatTurn(index, role, [content]))
    return turns


def _role(where: str, given: str) -> str:
    if given in _ROLES:
        return _ROLES[given]
    param, code = f"{where}.role", "unsupported_value" if given in _FOR_TOOLS else "invalid_value"
    why = f": {_NO_TOOLS}" if given in _FOR_TOOLS else ""
    raise invalid(f"{param} is {brief(given)}{why}; legal: {', '.join(map(repr, _ROLES))}", param, code=code)


def _content(where: str, message: ChatMessage, role: str) -> str:
    for name in _LEFT_EMPTY:
        if (value := getattr(message, name)) not in (None, "", [], {}):
            param, why = f"{where}.{name}", f": {_NO_TOOLS}" if "call" in name else ""
            raise invalid(f"{param} is {brief(value)}{why}; legal: null", param, code="unsupported_value")
    if message.type not in _TYPES:
        said = f"{where}.type is {brief(message.type)}; legal: null, 'text' or 'message'"
        raise invalid(said, f"{where}.type", code="unsupported_value")
    content, param = message.content, f"{where}.content"
    if content is None:
        if role == "assistant":
            return ""
        raise invalid(f"{param} is null; legal: a text, or parts of type 'text'", param)
    if isinstance(content, str):
        return content
    return "".join(_text_of_part(f"{param}[{index}]", part) for index, part in enumerate(content))


def _text_of_part(param: str, part: Any) -> str:
    legal = "legal: {'type': 'text', 'text': ...}, as this model reads only text"
    if not isinstance(part, dict):
        raise invalid(f"{param} is {brief(part)}; {legal}", param, code="invalid_type")
    if part.get("type") != "text":
        raise invalid(f"{param} has type {brief(part.get('type'))}; {legal}", param, code="unsupported_value")
    if not isinstance(text := part.get("text"), str):
        raise invalid(f"{param} has text {brief(text)}; {legal}", param, code="invalid_type")
    for name, value in part.items():
        if name not in ("type", "text", "cache_control") and value is not None:  # cache_control changes no text
            raise invalid(f"{param} has a field {brief(name)}; {legal}", param, code="unknown_parameter")
    return text


def _refused(error: Exception, turns: Sequence[ChatTurn]) -> ApiError:
    """Returns the chat format's error about turns as an error about the client's messages."""
    text, param = str(error).replace(" or pass tags='escape'", ""), "messages"
    if (named := _INDEX.match(text)) and int(named[1]) < len(turns):
        param = f"messages[{turns[int(named[1])].index}]"
        text = param + text[named.end() :]
    return invalid(shown(text, 500), param)
