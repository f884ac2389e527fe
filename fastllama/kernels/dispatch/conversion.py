"""A change of a weight's form (quantize, pack and back), dispatched like an op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastllama.kernels.dispatch.backends import Backends, Function, Table
from fastllama.kernels.dispatch.isolation import autocast_enabled, no_autocast
from fastllama.kernels.dispatch.plainness import check_memory, is_plain


class Conversion(Backends):
    """Returns tensors that it makes, where an Op writes into its caller's: it runs once for a weight, not in a step.

    So it is not registered with torch, and its implementation is chosen anew at each call, by the first argument. It
    runs without autocast, as an op does. What is not a plain tensor gets the reference, whose torch ops know it.
    check: takes the arguments and raises for what is not legal.
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
