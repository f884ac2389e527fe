"""What a case of an op is, and where its numbers come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

Results = tuple[Tensor, ...]
EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """One call of a public op: kernels.<op>(*args, **options).

    formula: the outputs from the same args, computed in their dtype. known: what the formula takes by name besides, and
    the op does not (the values that a packed weight was made of); it may hold no other tensor, for these are moved with
    the case. written: the args that the op writes in place, further outputs behind those it returns. view: what is
    compared, where that is not the outputs themselves. named: the last of args, where these are passed by name.
    """

    op: str
    label: str
    args: tuple[Any, ...]
    formula: Callable[..., Results]
    options: dict[str, Any] = field(default_factory=dict)
    written: tuple[int, ...] = ()
    view: Callable[[Results], Results] = lambda results: results
    named: tuple[str, ...] = ()
    known: dict[str, Tensor] = field(default_factory=dict)

    def expected(self) -> Results:
        """What the formula gives, as it is compared."""
        return self.view(self.formula(*self.args, **self.known))

    def to(self, target: torch.device | torch.dtype) -> Case:
        """The case on another device, or with its floating arguments (not options, not `known`) in another dtype."""

        def moved(arg: Any) -> Any:
            if not isinstance(arg, Tensor) or (isinstance(target, torch.dtype) and not arg.is_floating_point()):
                return arg
            return arg.to(target)

        options, known = self.options, self.known
        if not isinstance(target, torch.dtype):
            options, known = ({name: moved(value) for name, value in held.items()} for held in (options, known))
        return replace(self, args=tuple(map(moved, self.args)), options=options, known=known)


class Random:
    """Random tensors on the CPU, the same in every run."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal values, rounded to the dtype under test."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def order(self, count: int) -> Tensor:
        """0 to count - 1, shuffled."""
        return torch.randperm(count, generator=self.generator)
