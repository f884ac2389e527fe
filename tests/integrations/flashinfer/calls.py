"""Helpers for the tests of FlashInfer's replacement: the number of random calls, and a check for host reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.rounds import exhaustive

# Random calls of a fuzz test: some every day, and in the full round as many as its claim states.
CALLS = pytest.mark.parametrize("calls", [200, exhaustive(2000)])

_READS = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique_dim", "_unique2"}


class NoHostRead(TorchDispatchMode):
    """Raises where a value or a size is read from a tensor, which waits for a GPU. Inside our ops it sees nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        moved = name == "_to_copy" and (kwargs or {}).get("device") not in (None, args[0].device)
        assert name not in _READS, f"{name} reads a tensor on the host"
        assert not moved, f"{name} moves a tensor between devices"
        return func(*args, **(kwargs or {}))


def half_unit(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2
