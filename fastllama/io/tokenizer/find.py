"""Loads the tokenizer of a folder or file."""

from __future__ import annotations

import os
from pathlib import Path

from fastllama.errors import CheckpointError, why_unusable
from fastllama.io.formats.recognise import what_is
from fastllama.io.tokenizer.base import Tokenizer
from fastllama.io.tokenizer.sentencepiece_model import SentencePieceTokenizer
from fastllama.io.tokenizer.tokenizer_json import HFTokenizer

_MODEL, _JSON = "tokenizer.model", "tokenizer.json"


def load_tokenizer(tokenizer: str | Path) -> Tokenizer:
    """The tokenizer of a folder, or of a tokenizer.json or tokenizer.model, with the settings files beside it.

    Where a folder has both, tokenizer.json is read, as in transformers, if the package tokenizers can be imported.

    Raises:
        TypeError: unless `tokenizer` is a path.
        FileNotFoundError: if there is no tokenizer.
        CheckpointError: for a broken or foreign file, with its name and key.
        ExtraRequiredError: if there is only a tokenizer.json and the extra [hf] is missing.
    """
    if not isinstance(tokenizer, str | os.PathLike):
        raise TypeError(f"tokenizer must be a path, got {type(tokenizer).__name__}")
    path = Path(tokenizer)
    if path.is_dir():
        found = [path / name for name in (_JSON, _MODEL) if (path / name).is_file() or (path / name).is_symlink()]
        if not found:
            raise FileNotFoundError(f"no tokenizer in {path}; legal: {_MODEL} or {_JSON}")
        path = found[0] if len(found) == 1 or why_unusable("tokenizers") is None else found[1]
    elif not path.is_file() and not path.is_symlink():
        raise FileNotFoundError(f"no tokenizer at {path}; legal: {_MODEL}, {_JSON} or a folder with one")
    if not path.is_file():
        raise CheckpointError(f"{path} is {what_is(path)}")
    return HFTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)
