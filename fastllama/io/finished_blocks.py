"""Finished blocks of a model that is being quantized, in a folder: an interrupted run goes on where it ended."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from fastllama.errors import CheckpointError
from fastllama.io.formats.tensor_files import read_tensors
from fastllama.io.save import write_tensors


class FinishedBlocks:
    """One safetensors file for each key, of which a folder may hold those of several runs.

    A file appears complete or not at all. The folder is made with the first of them. found: keys that `get` found.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: set[str] = set()
        self._put: set[str] = set()

    def get(self, key: str) -> Mapping[str, Tensor] | None:
        """A block's tensors, mapped; None where there are none. Raises CheckpointError for a damaged file."""
        file = self._file(key)
        if not file.exists():
            return None
        try:
            tensors = dict(read_tensors(file))
        except CheckpointError:
            raise CheckpointError(f"{file} is damaged; delete it, and its block is quantized again") from None
        self.found.add(key)
        return tensors

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep a block's tensors. Raises OSError where that fails, and leaves nothing of them then."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self._file(key)
        partial = file.with_suffix(".partial")
        try:
            write_tensors(partial, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
        self._put.add(key)

    def discard(self) -> None:
        """Delete what was found and put here, and the folder if nothing else is in it."""
        for key in self.found | self._put:
            self._file(key).unlink(missing_ok=True)
        with suppress(OSError):  # others' files are in it
            self.folder.rmdir()

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"
