"""Tensors for the calls of ops: random inputs, and poisoned outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]  # of an op by name, with outputs and scratch memory, without optional outputs
CPU = torch.device("cpu")

EPS = 1e-5
DRAWN = 1 << 26  # random numbers generated at a time: 256 MiB in fp32


@dataclass(frozen=True)
class Maker:
    """Makes a call's tensors on a device, in a dtype where the op accepts several.

    On the meta device tensors have no values. generator: torch's default where None. `draws`: the dtype of random
    numbers before rounding. scratch: whether a call includes its workspace.
    """

    dtype: torch.dtype
    device: torch.device = CPU
    generator: torch.Generator | None = None
    draws: torch.dtype = torch.float32
    scratch: bool = False

    @classmethod
    def seeded(cls, dtype: torch.dtype, device: torch.device, seed: int) -> Maker:
        """A maker for benchmarks: deterministic by seed, and with each call's workspace."""
        return cls(dtype, device, torch.Generator(device).manual_seed(seed), scratch=True)

    @property
    def is_meta(self) -> bool:
        """Whether tensors have no values."""
        return self.device.type == "meta"

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal values, rounded; made some rows at a time: all at once would take three times the memory."""
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
        """Random integers from low to high - 1."""
        if self.is_meta:
            return torch.empty(shape, dtype=dtype, device=self.device)
        return torch.randint(low, high, shape, dtype=dtype, generator=self.generator, device=self.device)

    def some_of(self, end: int, count: int) -> Tensor:
        """`count` random int64 below `end`, distinct if count <= end."""
        if self.is_meta:
            return torch.empty(count, dtype=torch.int64, device=self.device)
        order = torch.randperm(max(end, count), generator=self.generator, dtype=torch.int64, device=self.device)
        return order[:count] % max(end, 1)

    def tensor(self, values: Any, dtype: torch.dtype) -> Tensor:
        """The given values as a tensor."""
        return torch.tensor(values, dtype=dtype, device=self.device)

    def workspace(self, allocate: Callable[..., Tensor], *args: Any) -> Tensor | None:
        """Scratch memory of `allocate(*args)`; None where it is not needed or not requested."""
        made = allocate(*args) if self.scratch else None
        return made if made is not None and made.numel() else None
