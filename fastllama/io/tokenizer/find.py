"""Which file of a folder the tokenizer is read from."""

from __future__ import annotations

from pathlib import Path

from fastllama.io.tokenizer.base import Tokenizer
from fastllama.io.tokenizer.sentencepiece_model import SentencePieceTokenizer
from fastllama.io.tokenizer.tokenizer_json import HFTokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer at `path`: a tokenizer.model, a tokenizer.json, or a folder holding one (tokenizer.model first).

    FileNotFoundError where there is none, CheckpointError for a broken or foreign file, ExtraRequiredError for a
    tokenizer.json without the extra [hf].
    """
    path = Path(path)
    if path.is_dir():
        names = ("tokenizer.model", "tokenizer.json")
        found = next((path / name for name in names if (path / name).is_file()), None)
        if found is None:
            raise FileNotFoundError(f"no tokenizer in {path}; legal: {' or '.join(names)}")
        path = found
    elif not path.is_file():
        raise FileNotFoundError(f"no tokenizer at {path}; legal: tokenizer.model, tokenizer.json or a folder with one")
    return HFTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)
