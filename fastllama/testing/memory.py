"""The addresses that belong to a kernel's argument: those of its elements, without the gaps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastllama.testing.floats import Array


@dataclass(frozen=True)
class Region:
    """The memory of one tensor: addresses [low, high); steps (stride, count) lead to runs of `run` bytes."""

    name: str
    tensor: torch.Tensor
    low: int
    high: int
    steps: tuple[tuple[int, int], ...]
    run: int

    def misses(self, addresses: Array, size: int) -> Array:
        """A mask of accesses of `size` bytes that are not inside one run of elements. addresses: uint64."""
        offset = addresses.astype(np.int64) - self.low
        outside = (offset < 0) | (offset + size > self.high - self.low)
        for stride, count in self.steps:
            index = offset // stride
            outside |= index >= count
            offset -= index * stride
        return np.asarray(outside | (offset + size > self.run)) if self.steps else outside

    def distance(self, address: int) -> int:
        """Bytes from the nearest end, 0 between them."""
        return max(self.low - address, address - self.high, 0)

    def where(self, address: int, size: int) -> str:
        """The position of an illegal access, as text."""
        if address < self.low:
            return f"{self.low - address} B before its start"
        if address + size > self.high:
            return f"{address + size - self.high} B past its end"
        return f"at byte {address - self.low}, between its elements"

    def __str__(self) -> str:
        dtype = str(self.tensor.dtype).removeprefix("torch.")
        strides = "" if self.tensor.is_contiguous() else f", strides {list(self.tensor.stride())}"
        return f"{self.name} ({dtype} {list(self.tensor.shape)}{strides})"


def region(name: str, pointer: Any) -> Region:
    """The memory of a tensor or of a triton.reinterpret of one.

    For overlapping strides (unfold, as_strided) only the extent is checked.
    """
    tensor = getattr(pointer, "base", pointer)
    low, size = tensor.data_ptr(), tensor.element_size()
    if not tensor.numel():
        return Region(name, tensor, low, low, (), 0)
    dims = [(stride * size, count) for stride, count in zip(tensor.stride(), tensor.shape, strict=True)]
    dims = sorted(((stride, count) for stride, count in dims if stride and count > 1), reverse=True)
    high = low + sum((count - 1) * stride for stride, count in dims) + size
    run = size
    while dims and dims[-1][0] == run:  # the contiguous tail is one run
        run *= dims.pop()[1]
    inner = run
    for stride, count in reversed(dims):
        if stride < inner:
            return Region(name, tensor, low, high, (), high - low)
        inner += (count - 1) * stride
    return Region(name, tensor, low, high, tuple(dims), run)


def pointers(value: Any, name: str) -> list[tuple[str, Any]]:
    """Every pointer in a kernel's argument, with its name: tensors, those in tuples, and the base of a descriptor."""
    if hasattr(value, "data_ptr"):
        return [(name, value)]
    if isinstance(value, (tuple, list)):
        return [pair for i, each in enumerate(value) for pair in pointers(each, f"{name}[{i}]")]
    return pointers(value.base, name) if hasattr(value, "base") else []
