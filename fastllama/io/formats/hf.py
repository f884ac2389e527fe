"""Hugging Face folders: config.json with safetensors or pytorch_model.bin weights, one file or shards with an index."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from fastllama.errors import CheckpointError
from fastllama.io.formats.base import Checkpoint, dtype_name, read_json
from fastllama.io.formats.tensor_files import open_safetensors, read_tensors
from fastllama.io.formats.weight_files import weight_files
from fastllama.layers.config import LlamaConfig


class HfCheckpoint(Checkpoint):
    """A folder as transformers' save_pretrained writes it. Memory-mapped: one shard's pages are held at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files, self._index = weight_files(path)
        for file in self._files:
            if file.suffix == ".safetensors":
                with open_safetensors(file):  # a truncated download shows before any memory is allocated
                    pass
        self.config = self._read_config()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for file in self._files:
            yield from read_tensors(file)

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
