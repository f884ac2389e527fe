"""Hugging Face folders: config.json with safetensors or pytorch_model.bin weights, one file or shards with an index."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastllama.errors import CheckpointError
from fastllama.io.formats.base import AGAIN, Checkpoint, dtype_name, read_json, read_torch
from fastllama.layers.config import LlamaConfig

# In the order transformers looks for them.
_WEIGHT_FILES = tuple(
    f"{stem}{end}" for stem in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")
)


class HfCheckpoint(Checkpoint):
    """A folder as transformers' save_pretrained writes it. Memory-mapped: one shard's pages are held at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files, self._index = _weight_files(path)
        for file in self._files:
            if file.suffix == ".safetensors":
                with _open_safetensors(file):  # a truncated download shows before any memory is allocated
                    pass
        self.config = self._read_config()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for file in self._files:
            yield from _safetensors(file) if file.suffix == ".safetensors" else read_torch(file).items()

    def file_of(self, name: str) -> Path:
        return self._index.get(name, self._files[0] if len(self._files) == 1 else self.path)

    def _read_config(self) -> LlamaConfig:
        file = self.path / "config.json"
        raw = read_json(file)
        if quantization := raw.get("quantization_config"):
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise CheckpointError(f"{file}: the weights are quantized ({method!r}); expected bf16, fp16 or fp32")
        generation = self.path / "generation_config.json"
        if generation.is_file() and (eos := read_json(generation).get("eos_token_id")) is not None:
            raw["eos_token_id"] = eos  # as transformers' generate: chat models stop at more than the base model's token
        try:
            config = LlamaConfig.from_hf(raw)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{file}: {error}") from None
        if config.dtype is None:
            _, first = next(self.tensors(), (None, None))
            config = config if first is None else replace(config, dtype=dtype_name(first))
        return config


def _weight_files(path: Path) -> tuple[list[Path], dict[str, Path]]:
    """The weight files in order, and which of them an index promises for each tensor name."""
    found = next((path / name for name in _WEIGHT_FILES if (path / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{path} holds no weights; expected one of {', '.join(_WEIGHT_FILES)}")
    if found.suffix != ".json":
        return [found], {}
    weight_map = read_json(found).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{found} has no weight_map; {AGAIN}")
    suffix = Path(found.stem.removesuffix(".index")).suffix
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or Path(file).suffix != suffix:
            raise CheckpointError(
                f"{found}: tensor {name} is in {file!r}, expected the name of a {suffix} file beside it"
            )
        if not (path / file).is_file():
            raise FileNotFoundError(f"{path / file} does not exist, but {found.name} has tensor {name} in it; {AGAIN}")
    return [path / file for file in sorted(set(weight_map.values()))], {n: path / f for n, f in weight_map.items()}


def _safetensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    with _open_safetensors(file) as handle:
        for name in handle.keys():  # noqa: SIM118 (safe_open is no mapping)
            try:
                tensor = handle.get_tensor(name)
            except (SafetensorError, RuntimeError, TypeError) as error:
                raise CheckpointError(f"{file}: tensor {name} cannot be read ({error}); {AGAIN}") from error
            yield name, tensor


@contextmanager
def _open_safetensors(file: Path) -> Iterator[Any]:
    try:
        handle = safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a complete safetensors file ({error}); {AGAIN}") from error
    with handle as opened:
        yield opened
