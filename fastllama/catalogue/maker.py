"""Tensors for the calls of ops: random inputs, and outputs that are poisoned until they are written."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]  # of an op by name, outputs and scratch memory among them; no optional output
CPU = torch.device("cpu")

EPS = 1e-5
DRAWN = 1 << 26  # numbers that are drawn at once: 256 MiB in fp32


@dataclass(frozen=True)
class Maker:
    """Where tensors lie, and in which dtype those are that an op takes in several.

    On the meta device nothing is drawn. generator: torch's default where None. draws: the dtype of random numbers
    before they are rounded. scratch: whether a call brings the workspace that it needs.
    """

    dtype: torch.dtype
    device: torch.device = CPU
    generator: torch.Generator | None = None
    draws: torch.dtype = torch.float32
    scratch: bool = False

    @classmethod
    def seeded(cls, dtype: torch.dtype, device: torch.device, seed: int) -> Maker:
        """One of a benchmark: the same numbers for a seed, and all memory that a call needs."""
        return cls(dtype, device, torch.Generator(device).manual_seed(seed), scratch=True)

    @property
    def is_meta(self) -> bool:
        """Whether tensors have no values."""
        return self.device.type == "meta"

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal values, rounded; drawn some rows at a time: all at once would take three times the memory."""
        made = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        if made.numel() and not self.is_meta:
            for rows in made.split(max(DRAWN * shape[0] // made.numel(), 1)):
                rows.copy_(torch.randn(rows.shape, generator=self.generator, device=self.device, dtype=self.draws))
        return made

    def fresh(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An output: NaN, or the largest integer."""
        dtype = dtype or self.dtype
        poison = math.nan if dtype.is_floating_point else torch.iinfo(dtype).max
        return torch.full(shape, poison, dtype=dtype, device=self.device)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype) -> Tensor:
        """Each from low to high - 1."""
        if self.is_meta:
            return torch.empty(shape, dtype=dtype, device=self.device)
        return torch.randint(low, high, shape, dtype=dtype, generator=self.generator, device=self.device)

    def some_of(self, end: int, count: int) -> Tensor:
        """`count` int64 below `end`, no two alike as long as there are enough."""
        if self.is_meta:
            return torch.empty(count, dtype=torch.int64, device=self.device)
        order = torch.randperm(max(end, count), generator=self.generator, dtype=torch.int64, device=self.device)
        return order[:count] % max(end, 1)

    def tensor(self, values: Any, dtype: torch.dtype) -> Tensor:
        """Values that are given."""
        return torch.tensor(values, dtype=dtype, device=self.device)

    def workspace(self, allocate: Callable[..., Tensor], *args: Any) -> Tensor | None:
        """Scratch memory that `allocate(*args)` makes; None where there is no need, or it is not wanted."""
        made = allocate(*args) if self.scratch else None
        return made if made is not None and made.numel() else None
