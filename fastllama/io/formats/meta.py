"""Meta's own layout: params.json and a consolidated.NN.pth per model-parallel rank, rotary pairs interleaved."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fastllama.errors import CheckpointError
from fastllama.io.formats.base import Checkpoint, dtype_name
from fastllama.io.formats.interleaved import LAYER_NAMES, half_split, rotary_heads
from fastllama.io.formats.json_files import AGAIN, read_json
from fastllama.io.formats.tensor_files import read_torch
from fastllama.kernels.dispatch.isolation import no_autocast
from fastllama.layers.config import LlamaConfig
from fastllama.layers.tensor_names import is_recomputed

_TOP_NAMES: dict[str, tuple[str, int | None]] = {
    "tok_embeddings": ("model.embed_tokens", 1),  # or 0: see _split
    "norm": ("model.norm", None),
    "output": ("lm_head", 0),
}
_EMBEDDING = "tok_embeddings.weight"


class MetaCheckpoint(Checkpoint):
    """A folder of Meta's download, all its files mapped. A tensor is merged from them when it is yielded.

    Llama 1 and 2 split the embedding by columns (fairscale's ParallelEmbedding), Llama 3 by rows
    (VocabParallelEmbedding): rows where each file has all `dim` columns.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        files = sorted(path.glob("consolidated.*.pth"))
        if not files:
            raise FileNotFoundError(f"{path} holds no consolidated.00.pth; the weights belong beside params.json")
        for rank, file in enumerate(files):
            if file.name != f"consolidated.{rank:02d}.pth":
                missing = path / f"consolidated.{rank:02d}.pth"
                raise FileNotFoundError(f"{missing} does not exist, but {file.name} does; {AGAIN}")
        self._files, self._ranks = files, [read_torch(file) for file in files]
        for file, rank_tensors in zip(files, self._ranks, strict=True):
            if odd := sorted(rank_tensors.keys() ^ self._ranks[0].keys()):
                raise CheckpointError(f"{file}: tensor {odd[0]} is not in all of {files[0].name} to {files[-1].name}")
        self.config = self._read_config()

    @property
    def nbytes(self) -> int:
        return sum(file.stat().st_size for file in self._files)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in self._ranks[0]:
            if is_recomputed(name):
                continue
            hf_name, dim = _translate(name)
            dim = self._split if name == _EMBEDDING else dim
            merged = self._merge(name, dim)
            heads = rotary_heads(hf_name, self.config)
            yield hf_name, merged if heads is None else half_split(merged, heads, f"{self.path}: tensor {name}")

    def _merge(self, name: str, dim: int | None) -> Tensor:
        parts = [rank_tensors[name] for rank_tensors in self._ranks]
        shapes = [list(part.shape) for part in parts]
        if any(shape != shapes[0] for shape in shapes):
            raise CheckpointError(f"{self.path}: tensor {name} has shapes {shapes} in the files, expected equal parts")
        if dim is None or len(parts) == 1:
            return parts[0]
        if dim >= parts[0].ndim:
            raise CheckpointError(f"{self.path}: tensor {name} has shape {shapes[0]}, expected a matrix")
        with no_autocast():  # under autocast, torch.cat of fp16 raises
            return torch.cat(parts, dim)

    def _read_config(self) -> LlamaConfig:
        embedding = self._ranks[0].get(_EMBEDDING)
        if embedding is None or embedding.ndim != 2:
            raise CheckpointError(
                f"{self.path / 'consolidated.00.pth'}: tensor {_EMBEDDING} is missing or not a matrix"
            )
        file = self.path / "params.json"
        params, count = read_json(file), len(self._ranks)
        rows, columns = embedding.shape
        self._split = 0 if columns == params.get("dim") else 1
        try:
            config = LlamaConfig.from_meta(params, vocab_size=rows * count if self._split == 0 else rows)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{file}: {error}") from None
        if self._split == 1 and columns * count != config.hidden_size:
            raise CheckpointError(
                f"{self.path}: the {count} consolidated.*.pth hold {columns * count} of the {config.hidden_size} "
                f"columns of tensor {_EMBEDDING}; are all files there?"
            )
        return replace(config, dtype=dtype_name(embedding))


def _translate(name: str) -> tuple[str, int | None]:
    """Hugging Face's name and the split dimension; an unknown name passes through, for the loader to refuse."""
    stem = name.removesuffix(".weight")
    if found := _TOP_NAMES.get(stem):
        return f"{found[0]}.weight", found[1]
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", stem)
    if match and (found := LAYER_NAMES.get(match[2])):
        return f"model.layers.{match[1]}.{found[0]}.weight", found[1]
    return name, None
