"""Reads fields of JSON files: checks of their values, and fields that have two names."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastllama.errors import shown

logger = logging.getLogger("fastllama")

_LARGEST_INTEGER = 2**31 - 1
_LARGEST_NUMBER = 3.4e38  # of fp32


def field(d: Mapping[str, Any], name: str, default: Any) -> Any:
    """`d[name]`, where JSON's null counts as absent."""
    value = d.get(name)
    return default if value is None else value


def first_of(places: Mapping[str, Any], default: Any) -> tuple[str, Any]:
    """Name and value of the first of several fields that has a value; without any, the first name and `default`.

    A later field with another value is logged, as it is not used.
    """
    held = [(name, value) for name, value in places.items() if value is not None]
    if not held:
        return next(iter(places)), default
    (used, value), *rest = held
    for name, other in rest:
        if other != value:
            parts = used, shown(repr(value)), name, shown(repr(other))
            logger.warning("%s is %s, so %s, which is %s, is not used, as in transformers", *parts)
    return used, value


def check_object(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is a JSON object."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} is {value!r}; legal: an object")


def check_integer(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is an integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; legal: an integer")


def check_size(name: str, value: Any) -> None:
    """Raise TypeError or ValueError unless `value` is an integer from 1 to 2^31 - 1."""
    check_integer(name, value)
    if not 1 <= value <= _LARGEST_INTEGER:
        raise ValueError(f"{name} is {value}; legal: {'at least 1' if value < 1 else f'at most {_LARGEST_INTEGER}'}")


def check_positive(name: str, value: Any) -> None:
    """Raise TypeError or ValueError unless `value` is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}; legal: a positive number")
    if not 0 < value <= _LARGEST_NUMBER:
        raise ValueError(f"{name} is {value!r}; legal: a positive number")


def check_flag(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is true or false."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; legal: true or false")
