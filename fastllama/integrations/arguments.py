"""What adapters of other libraries' functions share: the refusal of arguments that nothing here implements."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def refuse_arguments(function: str, **arguments: tuple[Any, ...]) -> None:
    """NotImplementedError for the first argument whose value is not one of those that mean "off".

    arguments: by name, what was given and then the values that mean "off", the library's own default first. Tensors
    are never off, and never read.
    """
    for name, (given, *off) in arguments.items():
        if isinstance(given, Tensor):
            seen = f"a tensor {list(given.shape)}"
        elif any(given is each or given == each for each in off):
            continue
        else:
            seen = repr(given)
        raise NotImplementedError(f"{name} is {seen}, which {function} does not implement here; legal: {off[0]!r}")
