"""Reads tensors from safetensors and torch.save files, memory-mapped, without running pickled code."""

from __future__ import annotations

import json
import logging
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from pickle import UnpicklingError
from pickletools import genops
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastllama.errors import CheckpointError
from fastllama.io.formats.json_files import AGAIN
from fastllama.io.formats.recognise import what_is

_LOG = logging.getLogger("fastllama")
_LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors package
_FOREIGN_CLASS = re.compile(r"GLOBAL ([\w.]+)")
_SAFE_PROTOCOL = 3  # highest pickle protocol that torch reads with weights_only
_OLD_PICKLES = 5  # before torch 1.6: magic number, protocol, machine, the state dict, storage names; then their bytes
_ONLY_TENSORS = "only tensors are read, as unpickling runs code; save its state dict as safetensors"


def read_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one weight file, by its suffix: .safetensors one by one, else a state dict of torch.save."""
    if file.suffix != ".safetensors":
        yield from read_torch(file).items()
        return
    with open_safetensors(file) as handle:
        for name in handle.keys():  # noqa: SIM118 (safe_open is no mapping)
            try:
                tensor = handle.get_tensor(name)
            except (SafetensorError, RuntimeError, TypeError, AttributeError):
                dtype = handle.get_slice(name).get_dtype()
                raise CheckpointError(
                    f"{file}: tensor {name} of dtype {dtype} cannot be read; expected BF16, F16 or F32"
                ) from None
            yield name, tensor


@contextmanager
def open_safetensors(file: Path) -> Iterator[Any]:
    """An open safetensors file. Raises CheckpointError where it is invalid, truncated, or has no tensors."""
    try:
        handle = safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError):
        raise CheckpointError(f"{file} {_safetensors_trouble(file)}") from None
    with handle as opened:
        if not opened.keys():
            raise CheckpointError(f"{file} holds no tensors; {AGAIN}")
        yield opened


def read_torch(path: Path) -> dict[str, Tensor]:
    """The state dict in a torch.save file, also one nested in a trainer's dictionary, without running pickled code.

    Memory-mapped, except for the format before torch 1.6, which is read into memory. Raises CheckpointError for
    anything but strided tensors with names.
    """
    if not path.exists() and not path.is_symlink():
        raise FileNotFoundError(f"{path} does not exist; the checkpoint is incomplete, {AGAIN}")
    try:
        sizes = _stored_sizes(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's; errors below replace them
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=sizes is not None)
    except MemoryError:
        raise
    except Exception as error:  # a damaged archive raises anything from KeyError to UnpicklingError
        raise CheckpointError(f"{path} {_torch_trouble(path, error)}") from None
    if sizes is not None and Counter(_storage_sizes(content)) - Counter(sizes):
        raise CheckpointError(f"{path} cannot be read as PyTorch weights: a tensor's data is cut short; {AGAIN}")
    return _state_dict(path, content)


def _stored_sizes(path: Path) -> list[int] | None:
    """Bytes of each storage in an archive that can be mapped; None for the older format and for compressed archives.

    torch compares them with the tensors' sizes when it reads a file, but not when it maps one.
    """
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            return None
    with zipfile.ZipFile(path) as archive:
        entries = [entry for entry in archive.infolist() if entry.filename.rpartition("/")[0].endswith("data")]
        return None if any(entry.compress_type for entry in entries) else [entry.file_size for entry in entries]


def _storage_sizes(content: Any) -> list[int]:
    """Bytes of each distinct, non-empty storage of the tensors in nested containers."""
    found, waiting = {}, [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta:
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, (list, tuple)):
            waiting += value
    return [size for size in found.values() if size]


def _state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    """The named tensors in a torch.save file's content; other entries, such as a trainer's step, are logged."""
    place = ""
    while not (found := _named_tensors(content)):
        nested = [key for key, value in content.items() if _holds_tensors(value)] if isinstance(content, dict) else []
        if not nested:
            raise CheckpointError(f"{path} is not a plain dictionary of tensors; expected a model's state dict")
        if len(nested) > 1:
            names = ", ".join(map(repr, nested))
            raise CheckpointError(f"{path} holds several sets of tensors ({names}); save one of them as a state dict")
        place, content = f"{place}[{nested[0]!r}]", content[nested[0]]
    if nested := [key for key, value in content.items() if _holds_tensors(value)]:
        raise CheckpointError(f"{path}: {nested[0]!r} holds tensors beside named tensors; save one state dict")
    if place:
        _LOG.info("%s: the weights are those under %s", path, place)
    others = [key for key in content if key not in found]
    if tensors := [key for key in others if isinstance(content[key], Tensor)]:
        raise CheckpointError(f"{path}: {tensors[0]!r} is not a tensor's name; expected a model's state dict")
    if others:
        _LOG.info("%s: not named tensors, ignored: %s", path, ", ".join(map(repr, others)))
    for name, tensor in found.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            kind = "has no data" if tensor.is_meta else "is sparse or quantized"
            raise CheckpointError(f"{path}: tensor {name} {kind}; expected a plain tensor")
    return found


def _named_tensors(content: Any) -> dict[str, Tensor]:
    if not isinstance(content, dict):
        return {}
    return {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}


def _holds_tensors(value: Any) -> bool:
    """Whether a dictionary has named tensors at any depth. An optimizer's state, keyed by numbers, does not count."""
    if not isinstance(value, dict):
        return False
    return bool(_named_tensors(value)) or any(
        isinstance(key, str) and _holds_tensors(inner) for key, inner in value.items()
    )


def _torch_trouble(path: Path, error: Exception) -> str:
    what = what_is(path)
    if what is None:
        return f"cannot be read as PyTorch weights: it does not begin as a file of torch.save; {AGAIN}"
    if what == "a Python pickle":
        return f"is a Python pickle, not a file of torch.save; {_ONLY_TENSORS}"
    if what == "a safetensors file":
        return f"is {what}; rename it to {'adapter_model' if path.stem == 'adapter_model' else 'model'}.safetensors"
    if not what.startswith("PyTorch"):
        return f"is {what}"
    if "TorchScript" in str(error):
        return "is a TorchScript program; expected a model's state dict"
    found = _FOREIGN_CLASS.search(str(error))
    whole, protocol = _look_at_pickles(path)
    if isinstance(error, UnpicklingError) and whole and not found and protocol > _SAFE_PROTOCOL:
        return (
            f"is pickled with protocol {protocol}, which torch does not read without running code; "
            "save it with the default, 2"
        )
    if isinstance(error, UnpicklingError) and whole:
        return f"holds Python objects{f' ({found[1]})' if found else ''}; {_ONLY_TENSORS}"
    return f"cannot be read as PyTorch weights: it is truncated or damaged; {AGAIN}"


def _look_at_pickles(path: Path) -> tuple[bool, int]:
    """Whether the pickles of a torch.save file are complete, and their highest protocol; nothing is unpickled."""
    protocols = [0]
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"PK"
        with zipfile.ZipFile(path) if zipped else nullcontext() as archive:
            name = next((name for name in archive.namelist() if name.endswith("data.pkl")), "") if archive else ""
            with archive.open(name) if archive else path.open("rb") as pickles:
                for _ in range(1 if zipped else _OLD_PICKLES):
                    protocols += [version for code, version, _ in genops(pickles) if code.name == "PROTO" and version]
    except Exception:  # as above
        return False, max(protocols)
    return True, max(protocols)


def _safetensors_trouble(file: Path) -> str:
    """The fault of a file that the safetensors package rejects, from its header: https://hf.co/docs/safetensors."""
    if (what := what_is(file)) != "a safetensors file":
        advice = "; rename it to pytorch_model.bin" if what and what.startswith("PyTorch") else ""
        return f"is {what}{advice}" if what else f"is not a safetensors file; {AGAIN}"
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > _LARGEST_HEADER:
            return f"has a header of {length} bytes, expected at most {_LARGEST_HEADER}; {AGAIN}"
        if 8 + length > size:
            return f"is not a complete safetensors file: {size} bytes, and the header alone has {8 + length}; {AGAIN}"
        header = opened.read(length)
    try:
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        expected = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, AttributeError, KeyError, IndexError, TypeError, RecursionError):
        return f"is not a complete safetensors file: its header is damaged; {AGAIN}"
    if size != expected:
        return f"is not a complete safetensors file: {size} bytes, expected {expected} by its header; {AGAIN}"
    dtypes = sorted({str(entry.get("dtype")) for entry in entries.values()})
    return f"has a header that contradicts itself, or a dtype that is unknown ({', '.join(dtypes)}); {AGAIN}"
