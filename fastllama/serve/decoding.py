"""Decodes a request body into a struct of wire.py; all errors are ApiErrors with status 400."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec

from fastllama.errors import nearest, shown
from fastllama.runtime.peer_names import names_here
from fastllama.serve import wire
from fastllama.serve.errors import ApiError, invalid

RequestT = TypeVar("RequestT", bound=msgspec.Struct)
MOST_BRACKETS = 50_000  # opening brackets of arrays and objects: a million take a second, in which nothing else runs
_PIECE = 65536
_INSIDE: dict[str, type[msgspec.Struct]] = {
    "messages": wire.ChatMessage,
    "stream_options": wire.StreamOptions,
    "response_format": wire.ResponseFormat,
}
# The end of msgspec's messages: "Expected `int | null`, got `str` - at `$.messages[0].name`"
_PATH = re.compile(r" - at `\$([^`]*)`\Z")
_PARAM = re.compile(r"(?:\.\w{1,40}|\[\d{1,9}\]){0,4}")  # as OpenAI writes it: "messages[0].content[1]"
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(\w+)`")
_TYPE = re.compile(r"Expected `(.*)`, got `(.*)`", re.DOTALL)
_JSON_TYPES = {
    "str": "a string",
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "array": "an array",
    "object": "an object",
}


def decode(body: bytes, kind: type[RequestT]) -> RequestT:
    """Decodes a body. Raises ApiError 400, and nothing else, if it is not a legal request."""
    if _num_brackets(body) > MOST_BRACKETS and (number := _num_brackets_outside_strings(body)) > MOST_BRACKETS:
        message = f"the body has {number} arrays and objects; legal: at most {MOST_BRACKETS}"
        raise invalid(message, code="invalid_json")
    try:
        return msgspec.json.decode(body, type=kind)
    except RecursionError:
        raise invalid("the body has too many brackets within brackets", code="invalid_json") from None
    except msgspec.ValidationError as error:
        raise _of_field(str(error), kind) from None
    except ValueError as error:  # a DecodeError, or invalid Unicode
        what = shown(error).removeprefix("JSON is malformed: ") if body else "it is empty"
        raise invalid(f"the body is not JSON in UTF-8: {what}", code="invalid_json") from None


def _num_brackets(text: bytes) -> int:
    return text.count(b"[") + text.count(b"{")


def _num_brackets_outside_strings(body: bytes) -> int:
    """Counts brackets of a JSON text, in pieces, between which other threads run. Undefined after a syntax error."""
    body = body.replace(rb"\\", b"").replace(rb"\"", b"")
    number = inside = 0
    for start in range(0, len(body), _PIECE):
        parts = body[start : start + _PIECE].split(b'"')
        number += _num_brackets(b"".join(parts[inside::2]))
        inside ^= (len(parts) - 1) & 1
    return number


def _of_field(text: str, kind: type[msgspec.Struct]) -> ApiError:
    """Returns the error for a field that is unknown, missing or of a wrong type."""
    path = _PATH.search(text)
    param = _PARAM.match(path[1])[0].lstrip(".") if path else ""  # type: ignore[index]  # it matches all texts
    text = text[: path.start()] if path else text
    if unknown := _UNKNOWN.fullmatch(text):
        return unknown_field(unknown[1], param, _INSIDE.get(re.split(r"\W", param)[0], kind).__struct_fields__)
    if missing := _MISSING.fullmatch(text):
        name = _joined(param, missing[1])
        return invalid(f"{name} is missing and has no default", name)
    where = param or "the body"
    if wrong := _TYPE.fullmatch(text):
        legal, seen = (
            " or ".join(_JSON_TYPES.get(each, each) for each in said.split(" | ")) for said in wrong.groups()
        )
        return invalid(f"{where} is {seen}; legal: {legal}", param or None, code="invalid_type")
    return invalid(f"{where} is wrong: {shown(text)}", param or None)  # numbers out of range


def unknown_field(name: str, inside: str, legal: Any) -> ApiError:
    """Returns the error for an unknown field; inside: the field that contains it, "" for the body."""
    peers = [each for each in names_here(name) if each in legal]
    near = peers[0] if peers else nearest(name[:64], legal, 0.0)  # the search takes seconds for a long name
    param = _joined(inside, shown(name, 60))
    return invalid(f"{param} is unknown; the nearest legal field is {near}", param, code="unknown_parameter")


def _joined(inside: str, name: str) -> str:
    return f"{inside}.{name}" if inside else name
