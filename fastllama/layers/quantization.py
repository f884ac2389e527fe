"""The legal values of `quantization`, and the methods that quantize a model's weights."""

from __future__ import annotations

from fastllama.errors import brief, check_choice

SCHEMES = ("int4", "int8", "w8a8")  # of quantized weights
KINDS = ("bf12", *SCHEMES)  # of packed linear layers
CHOICES = ("auto", *KINDS, None)
NONE = "none"  # spells None on command lines and in records
WORDS = (NONE, *KINDS)

METHODS = {  # each with the schemes that it supports
    "rtn": SCHEMES,
    "gptq": SCHEMES,
    "awq": ("int4",),
    "awq+gptq": ("int4",),
    "smoothquant": ("w8a8",),
    "smoothquant+gptq": ("w8a8",),
    "hqq": ("int4",),
}
WITHOUT_TEXT = ("rtn", "hqq")  # the methods without a calibration text
GROUP_SIZES = {"int4": (32, 64, 128, -1), "int8": (32, 64, 128, -1), "w8a8": (-1,)}  # -1: whole rows


def check_quantization(value: str | None) -> None:
    """Raise ValueError unless a value is one of CHOICES: "auto", one of KINDS, or None, which packs nothing."""
    check_choice("quantization", value, CHOICES)


def check_method(scheme: str, method: str, group_size: int | None = None) -> None:
    """Raise ValueError unless scheme, method and group size are legal together."""
    check_choice("scheme", scheme, SCHEMES)
    check_choice("method", method, METHODS)
    if scheme not in METHODS[method]:
        legal = ", ".join(each for each, schemes in METHODS.items() if scheme in schemes)
        raise ValueError(f"method is {method!r} for scheme {scheme!r}; legal for it: {legal}")
    if group_size is not None and (type(group_size) is not int or group_size not in GROUP_SIZES[scheme]):
        legal = ", ".join(map(str, GROUP_SIZES[scheme]))
        raise ValueError(f"group_size is {brief(group_size)} for scheme {scheme!r}; legal: {legal} (-1: whole rows)")


def quantization_of(word: str) -> str | None:
    """The value of a word on a command line or in a record: None for "none"."""
    return None if word == NONE else word
