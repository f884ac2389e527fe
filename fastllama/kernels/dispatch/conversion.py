"""Conversions of a weight (quantize, pack, and their inverses), dispatched like ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastllama.kernels.dispatch.backends import Backends, Function, Table
from fastllama.kernels.dispatch.isolation import autocast_enabled, no_autocast
from fastllama.kernels.dispatch.plainness import check_memory, is_plain


class Conversion(Backends):
    """A function that allocates and returns its results, unlike an Op: it runs once for a weight, not in every step.

    It is not registered with torch, and selects its implementation at each call, by the device of the first argument.
    It runs without autocast, as an op does. Tensors that are not plain run the reference, whose torch ops handle them.
    check: takes the arguments and raises for an illegal one.
    """

    def __init__(
        self,
        *,
        check: Callable[..., None],
        reference: Function,
        numba: Table | None = None,
    ) -> None:
        super().__init__(reference.__name__, reference=reference, numba=numba)
        self._check = check

    def __call__(self, first: Tensor, *others: Any) -> Any:
        if autocast_enabled(first.device.type):
            with no_autocast():  # not the check either: torch.stack of fp16 raises under autocast to bf16
                return self._run(first, *others)
        return self._run(first, *others)

    def _run(self, first: Tensor, *others: Any) -> Any:
        self._check(first, *others)
        tensors = [each for each in (first, *others) if isinstance(each, Tensor)]
        if not is_plain(tensors):
            return self._run_reference(first, *others)
        for tensor in tensors:
            check_memory("a tensor", tensor)
        return self.implementation(first.device.type).run(first, *others)
