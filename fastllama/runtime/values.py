"""Checks and conversions of argument values to Python types; numbers may be NumPy scalars or 0-d tensors.

Each function raises TypeError or ValueError in one sentence with the argument's name.
"""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from fastllama.arithmetic import FP32_LARGEST
from fastllama.errors import brief, check_range

if TYPE_CHECKING:
    from torch import Tensor

LogitsProcessor = Callable[[list[int], "Tensor"], "Tensor"]
INT64_LARGEST = 2**63 - 1
_MOST_BITS = 10_000  # Python prints at most 4300 digits, so that later messages could not show the number


class TokenBiases(dict[int, float]):
    """Token id -> number, immutable."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("logit_bias of SamplingParams is immutable; make a copy with dataclasses.replace")

    __setitem__ = __delitem__ = __ior__ = update = setdefault = pop = popitem = clear = _refuse

    def __reduce__(self) -> tuple[type[TokenBiases], tuple[dict[int, float]]]:
        return TokenBiases, (dict(self),)  # copy and pickle would set item by item


def plain(value: Any) -> Any:
    """Returns a NumPy scalar, 0-d array or 0-d tensor as a Python value; other values unchanged."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """Returns an integer within the limits; booleans are illegal."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {brief(value)} of type {type(value).__name__}")
    check_range(name, value, low, high)
    if value.bit_length() > _MOST_BITS:
        raise ValueError(f"{name} is {brief(value)}; legal: below 2**{_MOST_BITS}")
    return int(value)


def real(name: str, value: Any, low: float, high: float | None = None) -> float:
    """Returns a finite number within the limits."""
    value = plain(value)
    check_range(name, value, low, high)
    if abs(value) > sys.float_info.max:
        raise ValueError(f"{name} is {brief(value)}; legal: a finite number")
    return float(value)


def check_fp32(name: str, value: float, low: float = -FP32_LARGEST) -> None:
    """Raise ValueError for a number outside the range of fp32, or below `low`."""
    if not low <= value <= FP32_LARGEST:
        raise ValueError(f"{name} is {value!r}; legal: {low:.7g} to {FP32_LARGEST:.7g}, the range of fp32")


def flag(name: str, value: Any) -> bool:
    """Returns a boolean; numbers are illegal."""
    value = plain(value)
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {brief(value)}")
    return value


def strings(name: str, given: Any) -> tuple[str, ...]:
    """Returns one or more strings as a tuple; empty strings are illegal."""
    given = plain(given)
    each = (given,) if isinstance(given, str) else _elements(name, given, "a string or strings")
    for string in each:
        if not isinstance(string, str):
            raise TypeError(f"{name} must be a string or strings, got {brief(string)} of type {type(string).__name__}")
        if not string:
            raise ValueError(f"{name} is {brief(given)}; legal: strings of at least one character")
    return each


def processors(name: str, given: Any) -> tuple[LogitsProcessor, ...]:
    """Returns callables that accept generated ids and logits."""
    each = _elements(name, given, "a sequence of callables")
    for one in each:
        if not callable(one):
            raise TypeError(f"{name} must be a sequence of callables, got {brief(one)} of type {type(one).__name__}")
        try:
            signature = inspect.signature(one)
        except (TypeError, ValueError):  # not written in Python
            continue
        try:
            signature.bind([], None)
        except TypeError:
            raise TypeError(
                f"{name} holds {brief(one)}, which takes {signature}; legal: callables of two arguments, "
                "generated token ids and logits"
            ) from None
    return each


def token_ids(name: str, given: Any) -> tuple[int, ...]:
    """Returns token ids in any container as a tuple, checked as far as possible without a vocabulary."""
    ids = _elements(name, given, "token ids")
    as_they_are = {int}.issuperset(map(type, ids)) and min(ids, default=0) >= 0 and max(ids, default=0) <= INT64_LARGEST
    if as_they_are:  # takes milliseconds for a whole vocabulary
        return ids
    return tuple(integer(f"a token id in {name}", i, 0, INT64_LARGEST) for i in ids)


def token_biases(name: str, biases: Any) -> TokenBiases:
    """Returns a mapping of token ids to numbers in the range of fp32, or -inf."""
    if isinstance(biases, TokenBiases):
        return biases
    if not isinstance(biases, Mapping):
        raise TypeError(f"{name} must map token ids to numbers, got {brief(biases)} of type {type(biases).__name__}")
    ids = token_ids(name, biases)
    return TokenBiases(zip(ids, (_bias(name, *each) for each in zip(ids, biases.values(), strict=True)), strict=True))


def token_id_of_key(key: Any) -> Any:
    """Returns a key of a JSON object as the integer that it spells; any other key unchanged."""
    return int(key) if isinstance(key, str) and re.fullmatch("-?[0-9]{1,19}", key) else key


def _bias(name: str, token_id: int, given: Any) -> float:
    if type(given) is float and -FP32_LARGEST <= given <= FP32_LARGEST:
        return given
    bias, name = plain(given), f"{name}[{token_id}]"
    if isinstance(bias, float) and bias == -math.inf:
        return -math.inf
    bias = real(name, bias, -math.inf)
    check_fp32(name, bias)
    return bias


def _elements(name: str, values: Any, what: str) -> tuple[Any, ...]:
    if hasattr(values, "tolist"):  # arrays and tensors: element by element, the copies from the device would be slow
        values = values.tolist()
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be {what}, got {brief(values)} of type {type(values).__name__}")
    return tuple(values)
