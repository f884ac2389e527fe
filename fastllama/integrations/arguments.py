"""Shared by the adapters of other libraries' functions: refuses arguments that are not implemented here."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def refuse_arguments(function: str, **arguments: tuple[Any, ...]) -> None:
    """Raise NotImplementedError for the first argument whose value does not mean "off".

    arguments: by name, the given value and then the values that mean "off", the library's default first. A tensor is
    never off, and never read.
    """
    for name, (given, *off) in arguments.items():
        if isinstance(given, Tensor):
            seen = f"a tensor {list(given.shape)}"
        elif any(given is each or given == each for each in off):
            continue
        else:
            seen = repr(given)
        raise NotImplementedError(f"{name} is {seen}, which {function} does not implement here; legal: {off[0]!r}")
