"""The legal values of `quantization`, which says what becomes of a model's weights; packing.py does it."""

from __future__ import annotations

from fastllama.errors import check_choice

KINDS = ("bf12", "int4", "int8", "w8a8")  # what linear layers can be packed into
CHOICES = ("auto", *KINDS, None)
NONE = "none"  # None, on command lines and in records
WORDS = (NONE, *KINDS)


def check_quantization(value: str | None) -> None:
    """Raises ValueError unless a value is one of CHOICES: "auto", one of KINDS, or None, which packs nothing."""
    check_choice("quantization", value, CHOICES)


def quantization_of(word: str) -> str | None:
    """The value that a command line or a record spells so: None for "none"."""
    return None if word == NONE else word
