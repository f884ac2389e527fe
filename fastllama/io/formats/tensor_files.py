"""Reading tensors from safetensors files and from files of torch.save, memory-mapped, without running code in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastllama.errors import CheckpointError
from fastllama.io.formats.base import AGAIN


def read_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one weight file, by its suffix: .safetensors one by one, else a state dict of torch.save."""
    if file.suffix != ".safetensors":
        yield from read_torch(file).items()
        return
    with open_safetensors(file) as handle:
        for name in handle.keys():  # noqa: SIM118 (safe_open is no mapping)
            try:
                tensor = handle.get_tensor(name)
            except (SafetensorError, RuntimeError, TypeError) as error:
                raise CheckpointError(f"{file}: tensor {name} cannot be read ({error}); {AGAIN}") from error
            yield name, tensor


@contextmanager
def open_safetensors(file: Path) -> Iterator[Any]:
    """An open safetensors file. Raises CheckpointError where its header or its size is not right."""
    try:
        handle = safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a complete safetensors file ({error}); {AGAIN}") from error
    with handle as opened:
        yield opened


def read_torch(path: Path) -> dict[str, Tensor]:
    """The state dict in a file of torch.save, memory-mapped, without running code from it (weights_only)."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; the checkpoint is incomplete, {AGAIN}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except MemoryError:
        raise
    except Exception as error:  # a damaged archive surfaces as anything from KeyError to UnpicklingError
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} cannot be read as PyTorch weights ({reason}); {AGAIN}") from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise CheckpointError(f"{path} is not a plain dictionary of tensors; expected a model's state dict")
    return state
