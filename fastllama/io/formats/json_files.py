"""Reads a checkpoint's JSON files; errors name the place and the fault. Without torch, since tokenizers use it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastllama.errors import CheckpointError
from fastllama.io.formats.recognise import what_is

AGAIN = "download or copy it again"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises FileNotFoundError, or CheckpointError with the place where it is invalid.

    A key that occurs twice with different values is refused; transformers takes the last.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except _RepeatedKeyError as error:
        raise CheckpointError(f"{path} holds the key {error.key!r} twice with different values; keep one") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} {_json_trouble(path, error)}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {json_kind(content)}, expected a JSON object")
    return content


def json_kind(value: Any) -> str:
    """The JSON type of a value, with its article: "null", "a list", "a number"."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


class _RepeatedKeyError(ValueError):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if found[key] != value:
                raise _RepeatedKeyError(key)
    return found


def _json_trouble(path: Path, error: Exception) -> str:
    what = what_is(path)
    if what is not None and what != "a JSON file":
        return f"is {what}"
    if isinstance(error, json.JSONDecodeError):
        with path.open("rb") as file:
            if file.read(3) == b"\xef\xbb\xbf":
                return "begins with a byte order mark, which JSON may not; save it as UTF-8 without one"
        return f"is not valid JSON (line {error.lineno}, column {error.colno}); {AGAIN}"
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}; {AGAIN}"
    return (
        f"is nested too deeply to be a configuration; {AGAIN}"
        if isinstance(error, RecursionError)
        else (f"is not valid JSON; {AGAIN}")
    )
