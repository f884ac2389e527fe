"""Finished blocks of a model that is being quantized, in a folder: an interrupted run goes on where it ended."""

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
    """One safetensors file for each key, of which a folder may hold those of several runs, also at the same time.

    A file appears complete or not at all, and holds the SHA-256 of its key and tensors. The folder is made with the
    first of them. found: keys that `get` found.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: set[str] = set()
        self._put: set[str] = set()

    def get(self, key: str) -> Mapping[str, Tensor] | None:
        """A block's tensors, mapped; None where there are none. Raises CheckpointError for any file but `put`'s."""
        file = self._file(key)
        if not file.exists():
            return None
        tensors = _read(file, key)
        if tensors is not None:
            self.found.add(key)
        elif file.exists():  # else another run has deleted it meanwhile
            raise CheckpointError(f"{file} is damaged; delete it, and its block is quantized again")
        return tensors

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep a block's tensors. Raises OSError where that fails, and leaves nothing of them then."""
        file, kept = self._file(key), {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        with made_folder(self.folder), partial_folder(file) as scratch:
            write_tensors(scratch / file.name, kept, sha256=_digest(key, kept))
            (scratch / file.name).replace(file)
        self._put.add(key)

    def discard(self) -> None:
        """Delete what was found and put here, as far as it is still there, and the folder if nothing else is in it."""
        for key in self.found | self._put:
            self._file(key).unlink(missing_ok=True)
        with suppress(OSError):  # others' files are in it, or another run has deleted it
            self.folder.rmdir()

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def _read(file: Path, key: str) -> dict[str, Tensor] | None:
    """A file's tensors; None unless they are those that were put there for the key."""
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
