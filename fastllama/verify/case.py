"""A call of an op, and the formula that says what must come out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastllama.catalogue.arguments import inputs
from fastllama.catalogue.maker import Arguments

Results = tuple[Tensor, ...]
DEFAULTS = ("scale", "base2")  # left to the public function, whose defaults are judged so


@dataclass(frozen=True)
class FormulaCase:
    """One call of a public op: kernels.<op>(**given, **options).

    formula: the outputs from what is given and known by name, computed in the dtype of `given`. options: what the op is
    asked besides. known: what the formula takes besides (the values that a packed weight was made of). written: what
    the op writes in place, further outputs behind those it returns. view: what is compared, where that is not the
    outputs themselves. A formula may hold no other tensor, for these are moved with the case.
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
        """What the formula gives, as it is compared."""
        return self.view(self.formula(**self.given, **self.known))

    def to(self, target: torch.device | torch.dtype) -> FormulaCase:
        """The case on another device, or with what is given and floating (not `known`) in another dtype."""

        def moved(value: Any) -> Any:
            if not isinstance(value, Tensor) or (isinstance(target, torch.dtype) and not value.is_floating_point()):
                return value
            return value.to(target)

        known = self.known
        if not isinstance(target, torch.dtype):
            known = {name: moved(value) for name, value in known.items()}
        return replace(self, given={name: moved(value) for name, value in self.given.items()}, known=known)


def given(op: str, call: Arguments) -> Arguments:
    """What a case gives the op of a call in the catalogue: its inputs."""
    return {name: value for name, value in inputs(op, call).items() if name not in DEFAULTS}
