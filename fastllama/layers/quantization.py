"""The legal values of `quantization`, which says what becomes of a model's weights, and of methods that quantize."""

from __future__ import annotations

from fastllama.errors import brief, check_choice

SCHEMES = ("int4", "int8", "w8a8")  # what weights can be quantized into
KINDS = ("bf12", *SCHEMES)  # what linear layers can be packed into
CHOICES = ("auto", *KINDS, None)
NONE = "none"  # None, on command lines and in records
WORDS = (NONE, *KINDS)

METHODS = {  # how values are found, each with the schemes that it is for
    "rtn": SCHEMES,
    "gptq": SCHEMES,
    "awq": ("int4",),
    "awq+gptq": ("int4",),
    "smoothquant": ("w8a8",),
    "smoothquant+gptq": ("w8a8",),
    "hqq": ("int4",),
}
WITHOUT_TEXT = ("rtn", "hqq")  # of METHODS, those that look at weights alone
GROUP_SIZES = {"int4": (32, 64, 128, -1), "int8": (32, 64, 128, -1), "w8a8": (-1,)}  # -1: whole rows


def check_quantization(value: str | None) -> None:
    """Raises ValueError unless a value is one of CHOICES: "auto", one of KINDS, or None, which packs nothing."""
    check_choice("quantization", value, CHOICES)


def check_method(scheme: str, method: str, group_size: int | None = None) -> None:
    """Raises ValueError unless scheme, method and group size are known, and go together."""
    check_choice("scheme", scheme, SCHEMES)
    check_choice("method", method, METHODS)
    if scheme not in METHODS[method]:
        legal = ", ".join(each for each, schemes in METHODS.items() if scheme in schemes)
        raise ValueError(f"method is {method!r} for scheme {scheme!r}; legal for it: {legal}")
    if group_size is not None and (type(group_size) is not int or group_size not in GROUP_SIZES[scheme]):
        legal = ", ".join(map(str, GROUP_SIZES[scheme]))
        raise ValueError(f"group_size is {brief(group_size)} for scheme {scheme!r}; legal: {legal} (-1: whole rows)")


def quantization_of(word: str) -> str | None:
    """The value that a command line or a record spells so: None for "none"."""
    return None if word == NONE else word
