"""Writing a model as a Hugging Face folder, which transformers and every other runtime reads."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from fastllama.errors import check_range
from fastllama.io.formats.base import dtype_name
from fastllama.layers.model import LlamaForCausalLM
from fastllama.layers.weights import hf_tensors

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def save_model(
    model: LlamaForCausalLM,
    path: str | Path,
    tokenizer: str | Path | None = None,
    *,
    max_shard_size: int = 5_000_000_000,
) -> None:
    """Write config.json, generation_config.json and safetensors of at most `max_shard_size` bytes each (or one tensor).

    `tokenizer` is a tokenizer file, or a folder whose tokenizer files are copied. The folder `path` appears complete or
    not at all: everything is written beside it first. Raises ValueError if it exists and is not empty,
    FileNotFoundError if the tokenizer does not exist.
    """
    path = Path(path)
    check_range("max_shard_size", max_shard_size, 1)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"path is {str(path)!r}, which exists; legal: a new or an empty folder")
    extras = [] if tokenizer is None else _tokenizer_files(Path(tokenizer))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".partial", dir=path.parent) as scratch:
        partial = Path(scratch) / "model"
        partial.mkdir()
        _write_weights(model, partial, max_shard_size)
        for file in extras:
            shutil.copyfile(file, partial / file.name)
        config = replace(model.config, dtype=dtype_name(model.embed_tokens.weight)).to_hf()
        _write_json(partial / "generation_config.json", {k: config[k] for k in ("bos_token_id", "eos_token_id")})
        _write_json(partial / "config.json", config)
        partial.replace(path)


def _write_weights(model: LlamaForCausalLM, folder: Path, max_shard_size: int) -> None:
    shards = list(_shards(model, max_shard_size))
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", {"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def _shards(model: LlamaForCausalLM, max_shard_size: int) -> Iterator[dict[str, Tensor]]:
    """Views of the parameters, grouped in order: nothing is copied until a shard is written."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in hf_tensors(model):
        if shard and size + tensor.nbytes > max_shard_size:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _tokenizer_files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if found := [source / name for name in TOKENIZER_FILES if (source / name).is_file()]:
        return found
    wanted = ", ".join(TOKENIZER_FILES)
    raise FileNotFoundError(f"tokenizer is {str(source)!r}; legal: a tokenizer file, or a folder with one of {wanted}")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
