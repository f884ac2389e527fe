"""What lies beside a vocabulary: the names of special tokens, BOS and EOS rules, the chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastllama.errors import CheckpointError


@dataclass(frozen=True)
class TokenizerSettings:
    """What the files beside a vocabulary say; the defaults are those of a tokenizer.model that lies alone."""

    special_tokens: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | None = None
    add_bos: bool = True


def read_settings(folder: Path) -> TokenizerSettings:
    """The settings in `folder`."""
    config = read_json(folder / "tokenizer_config.json", missing={})
    named = {key: _content(value) for key, value in config.items() if key.endswith("_token")}
    template = folder / "chat_template.jinja"
    return TokenizerSettings(
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        | {key: text for key, text in named.items() if isinstance(text, str)},
        template.read_text(encoding="utf-8") if template.is_file() else config.get("chat_template"),
        config.get("add_bos_token") is not False,
    )


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def read_json(path: Path, *, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON object in `path`; `missing` in place of a file that is not there."""
    if missing is not None and not path.is_file():
        return missing
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; legal: an object")
    return value
