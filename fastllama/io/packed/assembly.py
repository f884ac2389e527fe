"""Assembles quantized weights from the tensors of compressed-tensors files."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastllama.errors import CheckpointError, shown
from fastllama.io.packed.quantization_config import LARGEST_GROUP, Storage
from fastllama.io.packed.words import unpack_bytes, unpack_nibbles, words_of
from fastllama.kernels.reference.int4 import MIDDLE
from fastllama.layers.tensor_names import is_quantized
from fastllama.quant.weight import QuantizedWeight

logger = logging.getLogger("fastllama")

WORDS, INTEGERS, SHAPE, SCALE, ZERO = "weight_packed", "weight", "weight_shape", "weight_scale", "weight_zero_point"
PARTS = (WORDS, SHAPE, SCALE, ZERO, "weight_g_idx")  # last parts of the names of a weight's tensors, besides "weight"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_DENSE = (*_FLOATS, torch.float64)  # dtypes of weights that are not quantized
_SHAPES = (torch.int64, torch.int32)
# Scales for the KV cache and for queries, of self_attn or of its projections' outputs.
_CACHE = re.compile(r".+\.self_attn\.([qkv]_(scale|zero_point)|[qkv]_proj\.output_(scale|zero_point))")


class _Part(NamedTuple):
    tensor: Tensor
    name: str
    file: Path

    def fail(self, trouble: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: tensor {shown(self.name)} {trouble}")

    def check(self, dtypes: Iterable[torch.dtype], shape: Iterable[int] | None = None) -> None:
        """Raise CheckpointError for another dtype or another shape."""
        dtypes = tuple(dtypes)
        if self.tensor.dtype not in dtypes:
            raise self.fail(f"has dtype {self.tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
        if shape is not None and tuple(self.tensor.shape) != tuple(shape):
            raise self.fail(f"has shape {list(self.tensor.shape)}, expected {list(shape)} by the weight's")


class Assembly:
    """Assembles weights from their tensors, in any order and from any files.

    Parts stay memory-mapped and unread until the weight is complete.
    """

    def __init__(self, storages: Mapping[str, Storage]) -> None:
        self._storages = storages
        self._parts: dict[str, dict[str, _Part]] = {}
        self._seen: set[str] = set()
        self._cache: list[str] = []

    def take(self, name: str, tensor: Tensor, file: Path) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
        """Take a file's tensor; yields it if its layer is not quantized, or the weight that it completes.

        Raises CheckpointError for a tensor that does not fit its layer's storage.
        """
        module, _, leaf = name.rpartition(".")
        part, storage = _Part(tensor, name, file), self._storages.get(module)
        if _CACHE.fullmatch(name):
            self._cache.append(name)
        elif storage is None and is_quantized(name) and leaf.startswith("weight_"):
            raise part.fail("is of a quantized weight, and no target of quantization_config matches its layer")
        elif storage is None or leaf == "bias":
            yield name, tensor
        elif leaf == ZERO and storage.symmetric:
            if tensor.any():  # earlier versions of compressed-tensors wrote them, all zeros
                raise part.fail(f"is not zero, and {storage.group} has symmetric weights")
        else:
            parts = self._parts.setdefault(module, {})
            if leaf == INTEGERS and tensor.dtype in _DENSE:
                expected = ", ".join(_expected(storage))
                raise part.fail(
                    f"has dtype {tensor.dtype}, expected integers: {storage.group} has {expected}. Quantization was "
                    "only simulated, on weights in floating point; legal: weights that are compressed"
                )
            if leaf not in _expected(storage):
                raise part.fail(f"is unexpected: {storage.group} has {', '.join(_expected(storage))}")
            if name in self._seen:
                raise part.fail("appears twice; legal: once, as a part of a quantized weight")
            self._seen.add(name)
            parts[leaf] = part
            if parts.keys() == _expected(storage).keys():
                yield f"{module}.weight", _weight(self._parts.pop(module), storage)

    def finish(self) -> None:
        """Call after the last tensor: raises CheckpointError for an incomplete weight."""
        for module, parts in self._parts.items():
            there = next(iter(parts.values()))
            missing = next(leaf for leaf in _expected(self._storages[module]) if leaf not in parts)
            raise CheckpointError(
                f"{there.file}: tensor {shown(f'{module}.{missing}')} is missing, beside {there.name}"
            )
        if self._cache:
            others = f" and {len(self._cache) - 1} more are" if self._cache[1:] else " is"
            logger.warning("tensor %s%s for a quantized KV cache, ignored", shown(self._cache[0]), others)


def _expected(storage: Storage) -> dict[str, None]:
    """The last parts of the names of a weight's tensors, in order."""
    values = (WORDS, SHAPE) if storage.packed else (INTEGERS,)
    return dict.fromkeys((*values, SCALE) if storage.symmetric else (*values, SCALE, ZERO))


def _weight(parts: Mapping[str, _Part], storage: Storage) -> QuantizedWeight:
    values = _unpacked(parts, storage) if storage.packed else _integers(parts[INTEGERS], storage)
    rows, columns = values.shape
    groups = columns // storage.group_size if storage.group_size else 1
    if storage.group_size and columns % storage.group_size:
        part = parts[SHAPE] if storage.packed else parts[INTEGERS]
        raise part.fail(f"gives {columns} columns; {storage.group} has groups of {storage.group_size}")
    scales = _scales(parts[SCALE], storage, rows, groups)
    zeros = None if storage.symmetric else _zeros(parts[ZERO], storage, rows, groups)
    if storage.group_size and storage.group_size > LARGEST_GROUP:  # split into the ops' largest groups
        times = storage.group_size // LARGEST_GROUP
        scales = scales.repeat_interleave(times, 1)
        zeros = None if zeros is None else zeros.repeat_interleave(times, 1)
    return QuantizedWeight(storage.kind, values, scales, zeros)


def _unpacked(parts: Mapping[str, _Part], storage: Storage) -> Tensor:
    words, shape = parts[WORDS], parts[SHAPE]
    shape.check(_SHAPES, (2,))
    rows, columns = shape.tensor.tolist()
    if rows < 1 or columns < 1:
        raise shape.fail(f"holds {[rows, columns]}, expected a number of rows and one of columns")
    words.check((torch.int32,), (rows, words_of(columns, storage.bits)))
    unpack = unpack_nibbles if storage.bits == 4 else unpack_bytes
    return unpack(words.tensor.contiguous(), columns)


def _integers(part: _Part, storage: Storage) -> Tensor:
    """Values that are stored unpacked."""
    part.check((torch.int8,))
    if part.tensor.ndim != 2:
        raise part.fail(f"has shape {list(part.tensor.shape)}, expected two dimensions")
    if not part.tensor.numel():
        raise part.fail(f"has shape {list(part.tensor.shape)}, expected rows and columns")
    return _nibbles(part) if storage.bits == 4 else part.tensor


def _nibbles(part: _Part) -> Tensor:
    """Integers from -8 to 7, as uint8 from 0 to 15."""
    low, high = (int(bound) for bound in torch.aminmax(part.tensor))
    if low < -MIDDLE or high >= MIDDLE:
        wrong = low if low < -MIDDLE else high
        raise part.fail(f"holds {wrong}, expected integers of 4 bits, {-MIDDLE} to {MIDDLE - 1}")
    return (part.tensor + MIDDLE).to(torch.uint8)


def _scales(part: _Part, storage: Storage, rows: int, groups: int) -> Tensor:
    part.check(_FLOATS, _shape_of(part, storage, rows, groups))
    if not part.tensor.isfinite().all():
        raise part.fail("holds NaN or infinity; the file is damaged")
    return part.tensor.reshape(-1, groups).expand(rows, groups).contiguous()


def _zeros(part: _Part, storage: Storage, rows: int, groups: int) -> Tensor | None:
    """Zero points in units of values; None where all are the middle value, the only one legal for 8 bits."""
    if storage.packed and storage.strategy != "tensor":
        part.check((torch.int32,), (words_of(rows, storage.bits), groups))
        unpack = unpack_nibbles if storage.bits == 4 else unpack_bytes
        found = unpack(part.tensor, rows, 0)
    else:
        part.check((torch.int8,), _shape_of(part, storage, rows, groups))
        found = _nibbles(part) if storage.bits == 4 else part.tensor
    if storage.bits == 4:
        return found.reshape(-1, groups).expand(rows, groups).contiguous()
    if found.any():
        wrong = int(found[found != 0].flatten()[0])
        raise part.fail(f"holds {wrong}; legal for weights of 8 bits: 0, as of symmetric ones")
    return None


def _shape_of(part: _Part, storage: Storage, rows: int, groups: int) -> tuple[int, ...]:
    if storage.strategy != "tensor":
        return rows, groups
    return () if part.tensor.ndim == 0 else (1,)
