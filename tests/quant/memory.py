"""Measures the memory that tensors take while something runs."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class MemoryWatch(TorchDispatchMode):
    """Bytes of tensors that torch's ops made within it: `held` now, and `most` at once. Kernels' own are not seen."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, int] = {}
        self.held = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._add(args, counts=False)
        out = func(*args, **(kwargs or {}))
        self._add(out if isinstance(out, (tuple, list)) else [out], counts=True)
        self.most = max(self.most, self.held)
        return out

    def _add(self, values: Any, *, counts: bool) -> None:
        for each in values:
            if isinstance(each, Tensor):
                storage = each.untyped_storage()
                if storage._cdata not in self._known:
                    self._known[storage._cdata] = storage.nbytes() if counts else 0
                    self.held += self._known[storage._cdata]
                    weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self.held -= self._known.pop(key)
