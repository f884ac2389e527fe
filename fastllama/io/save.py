"""Writes a model as a Hugging Face folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fastllama.errors import check_range
from fastllama.io.formats.base import dtype_name
from fastllama.io.formats.json_files import read_json
from fastllama.io.packed.compressed_tensors import Scheme, check_zeros, to_config, to_tensors
from fastllama.layers.linear import LinearBase, PackedLinear
from fastllama.layers.model import LlamaForCausalLM
from fastllama.layers.quantized import QuantizedLinear
from fastllama.layers.weights import HEAD, kept_tensors, slots
from fastllama.quant.weight import QuantizedWeight

# Files of a Llama's folder that load_tokenizer and transformers' AutoTokenizer read: vocabularies, other files.
_VOCABULARIES = ("tokenizer.model", "tokenizer.json", "vocab.json", "merges.txt")
_COMPANIONS = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "chat_templates/*.jinja", "additional_chat_templates/*.jinja"),
)
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # Rust's spelling of an errno


def save_model(
    model: LlamaForCausalLM,
    path: str | Path,
    tokenizer: str | Path | None = None,
    *,
    max_shard_size: int = 5_000_000_000,
) -> None:
    """Write config.json, generation_config.json and safetensors of at most `max_shard_size` bytes each (or one weight).

    Layers of int4, int8 and w8a8 stay quantized, in compressed-tensors' formats; peak memory is one shard.
    `tokenizer` is a folder whose tokenizer files and chat templates are copied, or one tokenizer file, which is copied
    with the other files of its folder except other vocabularies. The sampling settings of a generation_config.json
    there are kept; BOS and EOS are the model's. The folder `path` appears complete or not at all: a temporary folder is
    renamed. Raises ValueError if `path` is a link, not empty, or cannot be replaced, or if a layer has zeros that are
    not whole numbers, FileNotFoundError if the tokenizer does not exist, CheckpointError if a configuration beside it
    is broken, OSError where the disk is full.
    """
    path = Path(path)
    check_range("max_shard_size", max_shard_size, 1)
    check_new_folder(path)
    beside = Companions.of(tokenizer)
    quantization = _quantization_config(model)
    with made_folder(path.parent), partial_folder(path) as scratch:
        partial = scratch / "model"
        partial.mkdir()
        _write_weights(model, partial, max_shard_size)
        for name, file in beside.files.items():
            (partial / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, partial / name)
        config = replace(model.config, dtype=dtype_name(model.embed_tokens.weight)).to_hf()
        generation = beside.generation | {key: config[key] for key in ("bos_token_id", "eos_token_id")}
        _write_json(partial / "generation_config.json", generation)
        _write_json(partial / "config.json", beside.config | config | quantization)
        partial.replace(path)


def check_new_folder(path: Path, argument: str = "path") -> None:
    """Raise ValueError unless a folder can be written next to `path` and replace it; leaves no files.

    argument: its name in messages.
    """
    legal = "legal: a new or an empty folder"
    if path.is_symlink():  # a folder cannot replace a link
        raise ValueError(f"{argument} is {str(path)!r}, a link; {legal}")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{argument} is {str(path)!r}, which exists; {legal}")
    if os.path.ismount(path) or (path.exists() and path.samefile(".")):
        what = "a mount point" if os.path.ismount(path) else "the working directory"
        raise ValueError(f"{argument} is {str(path)!r}, {what}, which cannot be replaced; legal: a new folder in it")
    check_writable(path.parent, path, argument)


def check_writable(folder: Path, path: Path, argument: str) -> None:
    """Raise ValueError unless files can be created in a folder, or it can be created; leaves no files.

    path, argument: named in messages.
    """
    there = next(each for each in (folder, *folder.absolute().parents) if os.path.lexists(each))
    try:
        with tempfile.TemporaryDirectory(dir=there):
            pass
    except OSError as error:
        raise ValueError(
            f"{argument} is {str(path)!r}, and nothing can be written into {str(there)!r}: {error.strerror}; legal: a "
            "folder that may be written"
        ) from None


@contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make a folder and its parents; on an exception, those that were created and are empty are removed."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with suppress(OSError):  # not empty, or never created
            for each in missing:
                each.rmdir()
        raise


@contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """A uniquely named temporary folder next to `path`, to be renamed to it; removed on exit."""
    name = path.name[:40]  # at most 4 bytes each: file systems allow 255 bytes
    with tempfile.TemporaryDirectory(prefix=f".{name}.", suffix=".partial", dir=path.parent) as scratch:
        yield Path(scratch)


@dataclass(frozen=True)
class Companions:
    """A new folder's files besides the weights, taken from a tokenizer's folder.

    files: to copy, by their places in the new folder. generation, config: entries that generation_config.json and
    config.json inherit from those next to the tokenizer.
    """

    files: dict[str, Path]
    generation: dict[str, Any]
    config: dict[str, Any]

    @classmethod
    def of(cls, tokenizer: str | Path | None) -> Companions:
        """From a tokenizer's folder or file. Raises the errors of `save_model` about the tokenizer."""
        if tokenizer is None:
            return cls({}, {}, {})
        source = Path(tokenizer)
        files, config = _tokenizer_files(source), _settings(source, "config.json")
        kept = {key: config[key] for key in ("tokenizer_class",) if key in config}  # AutoTokenizer reads it here, too
        return cls(files, _settings(source, "generation_config.json"), kept)


def write_tensors(file: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    """Write a safetensors file. Raises OSError where the disk is full, instead of safetensors' own error."""
    file.touch()
    mode = file.stat().st_mode  # by the umask; safetensors 0.8 writes a file that only its owner may read
    try:
        save_file(tensors, file, {"format": "pt", **metadata})
        file.chmod(mode)
    except SafetensorError as error:
        if found := _OS_ERROR.search(str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(file)) from None
        raise


def _write_weights(model: LlamaForCausalLM, folder: Path, max_shard_size: int) -> None:
    makers, shards = dict(kept_tensors(model)), list(_shards(model, max_shard_size))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        sharded = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = f"model{sharded}.safetensors"
        weight_map |= dict.fromkeys(_write_shard(folder / file, {name: makers[name] for name in shard}), file)
    if len(shards) > 1:
        total = sum(size for shard in shards for size in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _write_shard(file: Path, makers: Mapping[str, Callable[[], Tensor | QuantizedWeight]]) -> list[str]:
    """Write one shard, free its tensors, and return their names."""
    tensors = {name: tensor for weight, make in makers.items() for name, tensor in _stored(weight, make()).items()}
    write_tensors(file, tensors)
    return list(tensors)


def _shards(model: LlamaForCausalLM, max_shard_size: int) -> Iterator[dict[str, int]]:
    """The weights' names in order, grouped into shards, each with its bytes; no tensor is made yet."""
    shard: dict[str, int] = {}
    for name, form in _forms(model):
        size = sum(tensor.nbytes for tensor in _stored(name, form).values())
        if shard and sum(shard.values()) + size > max_shard_size:
            yield shard
            shard = {}
        shard[name] = size
    yield shard


def _stored(name: str, weight: Tensor | QuantizedWeight) -> dict[str, Tensor]:
    """The tensors that store a weight."""
    return {name: weight} if isinstance(weight, Tensor) else to_tensors(name.removesuffix(".weight"), weight)


def _forms(model: LlamaForCausalLM) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
    """The model's weights by Hugging Face names; packed ones as shapes and dtypes only, without memory."""
    for name, slot in slots(model.config).items():
        path, _, leaf = slot.parameter.rpartition(".")
        layer, rows = model.get_submodule(path), slice(slot.start, slot.start + slot.rows)
        if leaf != "weight" or not isinstance(layer, PackedLinear):
            yield name, getattr(layer, leaf)[rows]
        elif not isinstance(layer, QuantizedLinear):
            yield name, torch.empty(slot.rows, layer.in_features, dtype=model.dtype, device="meta")
        else:
            values = torch.empty(slot.rows, layer.in_features, dtype=torch.uint8, device="meta")
            scales, zeros = (each if each is None else each[rows].to("meta") for each in (layer.scales, layer.zeros))
            assert scales is not None
            yield name, QuantizedWeight(layer.kind, values, scales, zeros)


def _quantization_config(model: LlamaForCausalLM) -> dict[str, Any]:
    """The quantization_config entry of config.json; {} without quantized layers."""
    schemes, dense = {}, []
    for name, slot in slots(model.config).items():
        path, _, leaf = slot.parameter.rpartition(".")
        layer, module = model.get_submodule(path), name.removesuffix(".weight")
        if leaf != "weight" or not isinstance(layer, LinearBase):
            continue
        if not isinstance(layer, QuantizedLinear):
            dense.append(module)
            continue
        schemes[module] = Scheme.of(layer)
        if layer.zeros is not None:
            check_zeros(module, layer.zeros[slot.start : slot.start + slot.rows])
    if model.config.tie_word_embeddings:
        dense.append(HEAD.removesuffix(".weight"))  # a Linear in transformers
    return {"quantization_config": to_config(schemes, dense)} if schemes else {}


def _tokenizer_files(source: Path) -> dict[str, Path]:
    """The files to copy, by their places in the new folder."""
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
    """A JSON file next to the tokenizer; {} where there is none."""
    file = (tokenizer if tokenizer.is_dir() else tokenizer.parent) / name
    return read_json(file) if file.is_file() else {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
