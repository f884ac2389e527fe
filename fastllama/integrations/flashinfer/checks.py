"""Type checks of arguments of FlashInfer's functions, before their shape, dtype or value is read."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from torch import Tensor

from fastllama.errors import brief, check_dtype, check_range
from fastllama.integrations.arguments import refuse_arguments
from fastllama.kernels.dispatch.checks import INTEGERS


def check_tensors(**given: Any) -> None:
    """Raise TypeError for the first argument that is not a tensor."""
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is {brief(value)}; legal: a tensor")


def check_optional(**given: Any) -> None:
    """Raise TypeError for the first argument that is neither None nor a tensor."""
    check_tensors(**{name: value for name, value in given.items() if value is not None})


def check_indices(**given: Any) -> None:
    """Raise TypeError for the first argument that is not a tensor of int32 or int64."""
    check_tensors(**given)
    for name, tensor in given.items():
        check_dtype(name, tensor, INTEGERS)


def check_integer(name: str, value: Any, low: int) -> None:
    """Raise TypeError unless `value` is a Python int, ValueError where it is below `low`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {brief(value)}; legal: an integer of at least {low}")
    check_range(name, value, low)


def number(function: str, name: str, given: Any) -> float:
    """A scale as a float. NotImplementedError for a tensor, which would have to be read from the device."""
    if isinstance(given, Tensor):
        refuse_arguments(function, **{name: (given, None)})
    if not isinstance(given, Real):
        raise TypeError(f"{name} is {brief(given)}; legal: a finite number")
    if not -math.inf < (scale := float(given)) < math.inf:  # false for NaN
        raise ValueError(f"{name} is {scale}; legal: a finite number")
    return scale
