"""Stores finished blocks of a model under quantization in a folder, so that an interrupted run can resume."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastllama.errors import CheckpointError
from fastllama.io.formats.tensor_files import open_safetensors, read_tensors
from fastllama.io.save import made_folder, partial_folder, write_tensors


class FinishedBlocks:
    """One safetensors file per key; several runs may share the folder, also concurrently.

    A file appears complete or not at all, and contains the SHA-256 of its key and tensors. The first file creates the
    folder. found: keys that `get` found.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: set[str] = set()
        self._put: set[str] = set()

    def get(self, key: str) -> Mapping[str, Tensor] | None:
        """A block's memory-mapped tensors, or None. Raises CheckpointError for a file that `put` did not write."""
        file = self._file(key)
        if not file.exists():
            return None
        tensors = _read(file, key)
        if tensors is not None:
            self.found.add(key)
        elif file.exists():  # else another run has just deleted it
            raise CheckpointError(f"{file} is damaged; delete it, and its block is quantized again")
        return tensors

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Store a block's tensors. Raises OSError where that fails, and leaves no partial file."""
        file, kept = self._file(key), {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        with made_folder(self.folder), partial_folder(file) as scratch:
            write_tensors(scratch / file.name, kept, sha256=_digest(key, kept))
            (scratch / file.name).replace(file)
        self._put.add(key)

    def discard(self) -> None:
        """Delete the files that this run found or wrote, and the folder if it is then empty."""
        for key in self.found | self._put:
            self._file(key).unlink(missing_ok=True)
        with suppress(OSError):  # not empty, or another run has deleted it
            self.folder.rmdir()

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def _read(file: Path, key: str) -> dict[str, Tensor] | None:
    """A file's tensors; None unless its digest matches the key and tensors."""
    try:
        tensors = dict(read_tensors(file))
        with open_safetensors(file) as opened:
            digest = (opened.metadata() or {}).get("sha256")
    except CheckpointError:
        return None
    return tensors if digest == _digest(key, tensors) else None


def _digest(key: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a key and of contiguous tensors on the CPU: names, dtypes, shapes and bytes."""
    found = hashlib.sha256(key.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        values: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        found.update(values)
    return found.hexdigest()
