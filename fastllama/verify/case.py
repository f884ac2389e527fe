"""A call of an op, and the formula for its expected outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastllama.catalogue.arguments import inputs
from fastllama.catalogue.maker import Arguments

Results = tuple[Tensor, ...]
DEFAULTS = ("scale", "base2")  # not passed, so that the public function's defaults are tested


@dataclass(frozen=True)
class FormulaCase:
    """One call of a public op: kernels.<op>(**given, **options).

    formula: computes the outputs from `given` and `known`, by name, in the dtype of `given`. options: further arguments
    of the op. known: further arguments of the formula (the values that were packed into a weight). written: arguments
    that the op updates in place, compared after its returned outputs. view: maps outputs to the compared values. A
    formula may close over no other tensor, since the case's tensors are moved between devices.
    """

    op: str
    label: str
    given: Arguments
    formula: Callable[..., Results]
    options: dict[str, Any] = field(default_factory=dict)
    written: tuple[str, ...] = ()
    view: Callable[[Results], Results] = lambda results: results
    known: dict[str, Tensor] = field(default_factory=dict)

    def expected(self) -> Results:
        """The formula's outputs, mapped by `view`."""
        return self.view(self.formula(**self.given, **self.known))

    def to(self, target: torch.device | torch.dtype) -> FormulaCase:
        """The case on another device, or with the floating tensors of `given` (not `known`) in another dtype."""

        def moved(value: Any) -> Any:
            if not isinstance(value, Tensor) or (isinstance(target, torch.dtype) and not value.is_floating_point()):
                return value
            return value.to(target)

        known = self.known
        if not isinstance(target, torch.dtype):
            known = {name: moved(value) for name, value in known.items()}
        return replace(self, given={name: moved(value) for name, value in self.given.items()}, known=known)


def given(op: str, call: Arguments) -> Arguments:
    """The inputs of a catalogue call."""
    return {name: value for name, value in inputs(op, call).items() if name not in DEFAULTS}
