"""From a path to a checkpoint in the format that it is recognised as."""

from __future__ import annotations

from pathlib import Path

from fastllama.errors import CheckpointError
from fastllama.io.formats.base import Checkpoint
from fastllama.io.formats.hf import HfCheckpoint
from fastllama.io.formats.llama2c import Llama2cCheckpoint
from fastllama.io.formats.meta import MetaCheckpoint


def open_checkpoint(path: Path) -> Checkpoint:
    """Recognise the format of a model folder (Hugging Face or Meta) or a llama2.c file.

    Raises FileNotFoundError if nothing is there, CheckpointError if it is no checkpoint or a damaged one.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_file():
        return Llama2cCheckpoint(path)
    if (path / "config.json").is_file():
        return HfCheckpoint(path)
    if (path / "params.json").is_file():
        return MetaCheckpoint(path)
    raise CheckpointError(
        f"{path} holds neither config.json (Hugging Face) nor params.json (Meta); "
        "give a folder that holds one, or a llama2.c file"
    )
