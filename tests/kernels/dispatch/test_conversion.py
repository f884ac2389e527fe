"""Conversions of weights (quantize, pack, unpack): any requested backend falls back to one that exists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

from fastllama import kernels
from fastllama.kernels import reference
from fastllama.kernels.dispatch.conversion import Conversion
from fastllama.kernels.ops import bf12, int4, int8
from tests.kernels.honest import assert_equal

CONVERSIONS = [
    pytest.param(value, id=value.name)
    for module in (bf12, int4, int8)
    for value in vars(module).values()
    if isinstance(value, Conversion)
]
WEIGHT = torch.randn(70, 192, generator=torch.Generator().manual_seed(0)).bfloat16()


def given(name: str) -> tuple[Any, ...]:
    """Legal arguments, made by the reference."""
    codes, scales, zeros = reference.quantize_int4(WEIGHT, 32, False)
    bytes_, byte_scales = reference.quantize_int8(WEIGHT, 64)
    return {
        "quantize_int4": (WEIGHT, 32, True),
        "dequantize_int4": (codes, scales, zeros),
        "pack_int4": (codes,),
        "unpack_int4": (reference.pack_int4(codes), 70, 192),
        "quantize_int8": (WEIGHT, 64),
        "dequantize_int8": (bytes_, byte_scales),
        "pack_int8": (bytes_,),
        "unpack_int8": (reference.pack_int8(bytes_), 70, 192),
        "pack_bf12": (WEIGHT,),
        "unpack_bf12": reference.pack_bf12(WEIGHT),
    }[name]


def flat(result: Any) -> list[Any]:
    return list(result) if isinstance(result, tuple) else [result]


def test_there_are_those_that_the_public_functions_call() -> None:
    forms = ("quantize_int", "dequantize_", "pack_", "unpack_")
    public = {name for name in kernels.__all__ if name.startswith(forms)}
    assert {param.values[0].name for param in CONVERSIONS} == public


@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_any_backend_may_be_asked_for(monkeypatch: pytest.MonkeyPatch, conversion: Conversion, backend: str) -> None:
    """Conversions have no Triton kernel: requesting it names no op's kernel, and changes no bit."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("FASTLLAMA_BACKEND", backend)
    args = given(conversion.name)
    expected = getattr(reference, conversion.name)(*args)
    for found, wanted in zip(flat(conversion(*args)), flat(expected), strict=True):
        if isinstance(wanted, torch.Tensor):
            assert_equal(found, wanted)
        else:
            assert found == wanted


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_the_variable_decides_at_each_call(monkeypatch: pytest.MonkeyPatch, conversion: Conversion) -> None:
    ran = []
    run: Callable[..., Any] = conversion._reference
    monkeypatch.setattr(conversion, "_reference", lambda *args: (ran.append(1), run(*args))[1])
    monkeypatch.setenv("FASTLLAMA_BACKEND", "reference")
    conversion(*given(conversion.name))
    assert len(ran) == 1
    with monkeypatch.context() as patch:
        patch.setenv("FASTLLAMA_BACKEND", "fastest")
        with pytest.raises(ValueError, match="FASTLLAMA_BACKEND is 'fastest'"):
            conversion(*given(conversion.name))


def test_what_unpack_bf12_is_given_is_checked() -> None:
    codes, outliers, exponent = reference.pack_bf12(WEIGHT)
    for args, message in (
        (
            (codes[:, 1:], outliers, exponent),
            r"^codes has shape \[70, 287\]; legal: \[N, K \* 3 / 2\], K a multiple of 64$",
        ),
        ((codes, outliers[:, :2], exponent), "^outliers has shape"),
        ((codes, outliers, 0), "^exponent"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.unpack_bf12(*args)


# Their results or errors depend on values: is a weight finite, is a quantized value below 16, what is an outlier?
READING = {"quantize_int4", "quantize_int8", "pack_int4", "pack_int8", "pack_bf12", "unpack_bf12"}


def changed(args: tuple[Any, ...], change: Callable[[torch.Tensor], torch.Tensor]) -> tuple[Any, ...]:
    return tuple(change(each) if isinstance(each, torch.Tensor) else each for each in args)


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_fake_tensors_give_fake_results_or_report_that_values_are_needed(conversion: Conversion) -> None:
    expected = flat(conversion(*given(conversion.name)))
    mode = FakeTensorMode()
    args = changed(given(conversion.name), mode.from_tensor)
    try:
        with mode:
            found = flat(conversion(*args))
    except (DataDependentOutputException, DynamicOutputShapeException):
        assert conversion.name in READING
        return
    for ours, theirs in zip(found, expected, strict=True):
        if isinstance(theirs, torch.Tensor):
            assert isinstance(ours, FakeTensor)
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_a_storage_that_was_freed_is_an_error(conversion: Conversion) -> None:
    args = changed(given(conversion.name), torch.Tensor.clone)
    args[0].untyped_storage().resize_(0)
    with pytest.raises((ValueError, RuntimeError), match=r"no memory for|not allocated"):
        conversion(*args)
