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
from fastllama.io.formats.json_files import read_json
from fastllama.layers.model import LlamaForCausalLM
from fastllama.layers.weights import hf_tensors

# Everything that load_tokenizer and transformers' AutoTokenizer read of a Llama's folder: vocabularies, the rest.
_VOCABULARIES = ("tokenizer.model", "tokenizer.json", "vocab.json", "merges.txt")
_COMPANIONS = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "chat_templates/*.jinja", "additional_chat_templates/*.jinja"),
)


def save_model(
    model: LlamaForCausalLM,
    path: str | Path,
    tokenizer: str | Path | None = None,
    *,
    max_shard_size: int = 5_000_000_000,
) -> None:
    """Write config.json, generation_config.json and safetensors of at most `max_shard_size` bytes each (or one tensor).

    `tokenizer` is a folder whose tokenizer files and chat templates are copied, or one tokenizer file, which is copied
    with what lies beside it but other vocabularies. The sampling settings of a generation_config.json there are kept;
    BOS and EOS are the model's. The folder `path` appears complete or not at all: it is written beside it first. Raises
    ValueError if it exists and is not empty, FileNotFoundError if the tokenizer does not exist, CheckpointError if a
    configuration beside that is broken.
    """
    path = Path(path)
    check_range("max_shard_size", max_shard_size, 1)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"path is {str(path)!r}, which exists; legal: a new or an empty folder")
    extras, generation, kept = {}, {}, {}
    if tokenizer is not None:
        extras = _tokenizer_files(Path(tokenizer))
        generation = _settings(Path(tokenizer), "generation_config.json")
        config = _settings(Path(tokenizer), "config.json")
        kept = {key: config[key] for key in ("tokenizer_class",) if key in config}  # AutoTokenizer reads it here, too
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".partial", dir=path.parent) as scratch:
        partial = Path(scratch) / "model"
        partial.mkdir()
        _write_weights(model, partial, max_shard_size)
        for name, file in extras.items():
            (partial / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, partial / name)
        config = replace(model.config, dtype=dtype_name(model.embed_tokens.weight)).to_hf()
        generation |= {key: config[key] for key in ("bos_token_id", "eos_token_id")}
        _write_json(partial / "generation_config.json", generation)
        _write_json(partial / "config.json", kept | config)
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


def _tokenizer_files(source: Path) -> dict[str, Path]:
    """What is to be copied, by its place in the new folder."""
    folder, vocabularies = source, [source / name for name in _VOCABULARIES if (source / name).is_file()]
    found = {file.name: file for file in vocabularies}
    if source.is_file():
        folder, found = source.parent, {"tokenizer.json" if source.suffix == ".json" else "tokenizer.model": source}
    if not found:
        wanted = " or ".join(_VOCABULARIES[:3])
        raise FileNotFoundError(f"tokenizer is {str(source)!r}; legal: a tokenizer file, or a folder with {wanted}")
    beside = (file for name in _COMPANIONS for file in folder.glob(name))
    return found | {file.relative_to(folder).as_posix(): file for file in beside if file.is_file()}


def _settings(tokenizer: Path, name: str) -> dict[str, Any]:
    """A JSON file that lies with the tokenizer; {} where there is none."""
    file = (tokenizer if tokenizer.is_dir() else tokenizer.parent) / name
    return read_json(file) if file.is_file() else {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
