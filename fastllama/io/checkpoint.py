"""Opens a checkpoint in the format recognised from its files."""

from __future__ import annotations

from pathlib import Path

from fastllama.errors import CheckpointError
from fastllama.io.formats.base import Checkpoint
from fastllama.io.formats.hf import HfCheckpoint
from fastllama.io.formats.llama2c import Llama2cCheckpoint
from fastllama.io.formats.meta import MetaCheckpoint
from fastllama.io.formats.recognise import what_is

_CONFIGURATIONS = ("config.json", "params.json")


def open_checkpoint(path: Path) -> Checkpoint:
    """Recognise the format of a model folder (Hugging Face or Meta) or a llama2.c file.

    Raises FileNotFoundError if nothing is there, CheckpointError if it is not a checkpoint or damaged.
    """
    try:
        if not path.exists():
            if (what := what_is(path)) is not None:
                raise CheckpointError(f"{path} is {what}")
            raise FileNotFoundError(f"{path} does not exist")
        if path.is_file():
            return Llama2cCheckpoint(path)
        if (path / "config.json").is_file():
            return HfCheckpoint(path)
        if (path / "params.json").is_file():
            return MetaCheckpoint(path)
        raise CheckpointError(_no_configuration(path))
    except PermissionError as error:
        place = error.filename or path
        raise CheckpointError(f"{place} may not be read by this user; change its permissions") from None


def _no_configuration(path: Path) -> str:
    """The error message for a folder without a configuration: what it is instead, or where the model may be."""
    for name in _CONFIGURATIONS:
        if (what := what_is(path / name)) is not None:
            return f"{path / name} is {what}"
    if (path / "adapter_config.json").is_file():
        return f"{path} is an adapter and no model; give its base"
    if (path / "model_index.json").is_file():
        return f"{path} is a pipeline of diffusers (model_index.json), not a Llama"
    if (path / "modules.json").is_file():
        return f"{path} is a model of sentence-transformers (modules.json), not a Llama"
    if snapshots := _snapshots(path):
        others = f" (or another of {len(snapshots)})" if snapshots[1:] else ""
        return f"{path} is a folder of the Hub's cache; give {snapshots[0]}{others}"
    if any(path.glob("models--*--*")):
        return f"{path} is the Hub's cache; give the Hub id of a model, as owner/name"
    nothing = f"{path} holds neither config.json (Hugging Face) nor params.json (Meta)"
    if nested := sorted(child for child in path.iterdir() if any((child / name).is_file() for name in _CONFIGURATIONS)):
        others = f", and {len(nested) - 1} more folders in it do" if nested[1:] else ""
        return f"{nothing}, but {nested[0].name} in it does{others}; give {nested[0]}"
    for pattern, advice in {
        "*.gguf": "a GGUF file, which is not read; give the Hugging Face folder that it was made from",
        "consolidated.*.pth": "Meta's weights; params.json belongs beside them",
        "*.safetensors": "weights; config.json belongs beside them",
        "pytorch_model*.bin": "weights; config.json belongs beside them",
        "*.bin": "files; give one of them, if it is a llama2.c file",
        "*.index.json": "an index of weights; config.json belongs beside it",
    }.items():
        if found := sorted(path.glob(pattern)):
            return f"{nothing}, but {found[0].name}: {advice}"
    if not any(path.iterdir()):
        return f"{path} is an empty folder; give one that holds a model"
    return f"{nothing}; give a folder that holds one, or a llama2.c file"


def _snapshots(path: Path) -> list[Path]:
    """The snapshots in one model's folder of the Hub's cache, that of branch main first."""
    if path.name == "snapshots":
        path = path.parent
    main = path / "refs" / "main"
    first = main.read_text(encoding="utf-8", errors="replace").strip() if main.is_file() else ""
    found = [child for child in (path / "snapshots").glob("*") if child.is_dir()]
    return sorted(found, key=lambda child: (child.name != first, child.name))
