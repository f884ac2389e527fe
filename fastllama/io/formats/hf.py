"""Hugging Face folders: config.json with safetensors or pytorch_model.bin weights, one file or shards with an index."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastllama.errors import CheckpointError, brief, shown
from fastllama.io.formats.base import Checkpoint, dtype_name
from fastllama.io.formats.json_files import read_json
from fastllama.io.formats.tensor_files import open_safetensors, read_tensors
from fastllama.io.formats.weight_files import weight_files
from fastllama.io.packed.assembly import PARTS, WORDS, Assembly
from fastllama.io.packed.quantization_config import METHOD, Storage, read_config
from fastllama.layers.config import LlamaConfig, token_ids
from fastllama.layers.tensor_names import is_quantized
from fastllama.layers.weights import EMBEDDING, HEAD, slots
from fastllama.quant.weight import QuantizedWeight

logger = logging.getLogger("fastllama")


class HfCheckpoint(Checkpoint):
    """A folder as written by transformers' save_pretrained. Memory-mapped: one shard's pages are held at a time.

    Tensors get the names of LlamaForCausalLM, as in transformers: the prefix "model." is missing in files of LlamaModel
    and doubled in those of wrappers. Where tie_word_embeddings is true, the one matrix has the embedding's name,
    whichever of the two is stored; a head with other values unties them, as in transformers 5, and so does a quantized
    one. Linear layers quantized by compressed-tensors are yielded as quantized weights.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files, index = weight_files(path)
        for file in self._files:
            if file.suffix == ".safetensors":
                with open_safetensors(file):  # a truncated download shows before any memory is allocated
                    pass
        raw = read_json(path / "config.json")
        self.config = self._read_config(raw)
        self._names = {name: name for name in (*slots(self.config), HEAD)}
        self._storages = self._read_quantization(raw)
        self._names |= {name: name for layer in self._linears() for part in PARTS if (name := f"{layer}.{part}")}
        self._index = {self._name(name): file for name, file in index.items()}
        if self.config.tie_word_embeddings:
            self._look_at_tied()
        self.quantization = self._first_kind()
        if self.config.dtype is None:
            names = slots(self.config)
            stored = (tensor for name, tensor, _ in self._stored() if name in names)
            first = next((tensor for tensor in stored if tensor.is_floating_point() or self._storages is None), None)
            self.config = self.config if first is None else replace(self.config, dtype=dtype_name(first))

    @property
    def nbytes(self) -> int:
        return sum(file.stat().st_size for file in self._files)

    def tensors(self) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
        if self._storages is None:
            yield from ((name, tensor) for name, tensor, _ in self._stored())
            return
        assembly = Assembly(self._storages)
        for name, tensor, file in self._stored():
            yield from assembly.take(name, tensor, file)
        assembly.finish()

    def _stored(self) -> Iterator[tuple[str, Tensor, Path]]:
        """The tensors as stored in the files."""
        for file in self._files:
            for name, tensor in read_tensors(file):
                yield self._name(name), tensor, file

    def file_of(self, name: str) -> Path:
        stored = name if name in self._index else f"{name.removesuffix('.weight')}.{WORDS}"
        return self._index.get(stored, self._files[0] if len(self._files) == 1 else self.path)

    def _name(self, name: str) -> str:
        return self._names.get(name.removeprefix("model."), self._names.get(f"model.{name}", name))

    def _look_at_tied(self) -> None:
        head = HEAD.removesuffix(".weight")
        found = {
            name: tensor for name, tensor, _ in self._stored() if name.rpartition(".")[0] == head or name == EMBEDDING
        }
        if found.keys() == {HEAD}:
            self._names[HEAD] = EMBEDDING
        parts = [name for name in found if is_quantized(name)]
        if parts or (len(found) == 2 and not _equal(found[EMBEDDING], found[HEAD])):
            logger.warning(
                "%s: tie_word_embeddings is true, but %s: not tied%s",
                self.path / "config.json",
                f"{head} is quantized" if parts else f"{HEAD} differs from {EMBEDDING}",
                "" if parts else ", as in transformers",
            )
            self.config = replace(self.config, tie_word_embeddings=False)

    def _linears(self) -> dict[str, int]:
        """The columns of each linear layer's weight, by name."""
        config = self.config
        sizes = {"o_proj": config.q_size, "down_proj": config.intermediate_size}
        layers = [name.removesuffix(".weight") for name in slots(config) if name.endswith("_proj.weight")]
        return {name: sizes.get(name.rpartition(".")[2], config.hidden_size) for name in (*layers, "lm_head")}

    def _read_quantization(self, raw: dict[str, Any]) -> dict[str, Storage] | None:
        """How the quantized linear layers are stored, by name; None where the files are not quantized."""
        if not (quantization := raw.get("quantization_config")):
            return None
        storages = read_config(quantization, self.path / "config.json", self._linears())
        self.numbers_per_byte = max((8 // storage.bits for storage in storages.values()), default=1)
        return storages

    def _first_kind(self) -> str | None:
        """The kind of the first quantized layer, as `packing.kind_of` reports it; a tied head does not count."""
        names = slots(self.config)
        kinds = (each.kind for layer, each in (self._storages or {}).items() if f"{layer}.weight" in names)
        return next(kinds, None)

    def _read_config(self, raw: dict[str, Any]) -> LlamaConfig:
        file, generation = self.path / "config.json", self.path / "generation_config.json"
        if quantization := raw.get("quantization_config"):
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            if method != METHOD:
                raise CheckpointError(
                    f"{file}: quantization_config specifies weights quantized by {brief(method)}; "
                    f"expected bf16, fp16, fp32 or {METHOD}"
                )
        elif raw.get("compression_config"):
            raise CheckpointError(
                f"{file}: compression_config specifies the quantization of the weights, in an older spelling; "
                "legal: the same under the name quantization_config, as current writers have it"
            )
        try:
            config = LlamaConfig.from_hf(raw)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{file}: {shown(error, 600)}") from None
        # generation_config.json has precedence, as in transformers' generate: chat models have more stop tokens than
        # base models. Where it names none, config.json's are used; transformers would not stop at all.
        if generation.is_file() and (eos := read_json(generation).get("eos_token_id")) is not None:
            ends = eos if isinstance(eos, list) else [eos]
            # transformers runs such a model, but no answer can end with that id
            if beyond := [end for end in ends if isinstance(end, int) and end >= config.vocab_size]:
                raise CheckpointError(
                    f"{generation}: eos_token_id is {beyond[0]}, and {file.name} has vocab_size={config.vocab_size}; "
                    "legal: an id that the model has"
                )
            try:
                ids = token_ids(f"{generation}: eos_token_id", eos, config.vocab_size)
            except TypeError as error:
                raise CheckpointError(str(error)) from None
            config = replace(config, eos_token_ids=ids)
        return config


def _equal(embedding: Tensor, head: Tensor) -> bool:
    return embedding.shape == head.shape and torch.equal(embedding.to(head.dtype), head)
