"""No setting of torch for a process or a thread changes a bit of a kernel's result, or what it allocates.

Of all ops, conversions and helpers, on each backend of a CPU, under each of tests/torch_settings.py: 38 pairs of an op
and a backend, 15 of a conversion and a backend, 19 settings.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama import kernels
from fastllama.catalogue import matmuls
from fastllama.catalogue.arguments import in_order, inputs
from fastllama.catalogue.llama_calls import LlamaCall
from fastllama.catalogue.maker import Arguments, Maker
from fastllama.catalogue.rotary import PAGE
from fastllama.catalogue.sizes import LlamaSizes
from fastllama.catalogue.table import CATALOGUE
from fastllama.kernels import reference
from fastllama.kernels.dispatch.conversion import Conversion
from fastllama.kernels.dispatch.isolation import no_autocast
from fastllama.kernels.dispatch.op import OPS
from fastllama.kernels.launch.kernel_call import VendorMatmul
from fastllama.kernels.ops import bf12, int4, int8
from tests.kernels.honest import DTYPES, implementation, on_cpu
from tests.rounds import exhaustive
from tests.torch_settings import SETTINGS, default_settings

CPU = torch.device("cpu")
# Large enough that oneDNN multiplies by bf16 instructions where it may: not [70, 64] by [192, 64].
LLAMA = LlamaSizes("small", hidden=256, intermediate=96, heads=4, kv_heads=2, head_dim=64, vocab=128)
CONVERSIONS = [
    value for module in (bf12, int4, int8) for value in vars(module).values() if isinstance(value, Conversion)
]
# In the interpreter a call takes 0.1 s: one setting for each way to go wrong.
TELLING = ("default dtype bf16", "default device meta", "autocast bf16", "matmul precision medium")


def calls(op: str) -> Iterator[tuple[str, Arguments]]:
    """All optional tensors, then one, a few and many rows of a small Llama, each with pages of every kind."""
    if op == "matmul_int4":  # what zeros add is a matmul of fp32, which has a column for each group
        call = matmuls.matmul_int4(Maker(torch.float32), 70, 96, 8192, group=64, zeros=torch.float32)
        yield "many groups with zeros", in_order(op, call)
    kinds = dict.fromkeys(shape.pages_dtype for shape in CATALOGUE[op].shapes)
    for dtype in DTYPES:
        yield f"small, {dtype}", in_order(op, CATALOGUE[op].small(Maker(dtype)))
        for rows in (1, 3, 70):
            for pages_dtype in (*kinds, torch.float8_e4m3fn) if len(kinds) > 1 or op == "rope_and_write_kv" else kinds:
                context = 2 * PAGE if CATALOGUE[op].shapes[0].context else 0
                call = LlamaCall(op, LLAMA, rows, context, dtype, pages_dtype)
                yield f"{call.label}, {dtype}", call.make(CPU, seed=0)


def bits(value: Any) -> Any:
    """What is compared between two results: a tensor's bits, dtype, shape and device."""
    if isinstance(value, Tensor):
        assert value.device == CPU, "a result on another device"
        data = value.detach().contiguous().view(-1).view(torch.uint8) if value.numel() else value.new_empty(0).byte()
        return value.dtype, tuple(value.shape), data.numpy().tobytes()
    return [bits(each) for each in value] if isinstance(value, (tuple, list)) else value


def copied(call: Arguments) -> Arguments:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in call.items()}


def changes(run: Callable[[], Any], settings: dict[str, Any]) -> list[str]:
    """The settings under which `run` gives different bits, or raises."""
    expected, before, found = bits(run()), default_settings(), []
    for name, setting in settings.items():
        try:
            with setting():
                result = run()
            if bits(result) != expected:
                found.append(f"{name}: other bits")
        except Exception as error:
            found.append(f"{name}: {type(error).__name__}: {error}")
        assert default_settings() == before, f"{name}: a setting was not put back"
    return found


def op_changes(op: str, call: Arguments, settings: dict[str, Any]) -> list[str]:
    """Settings that change the op's public function: its results, and the inputs that it updates in place."""
    given = inputs(op, call)

    def run() -> Any:
        return getattr(kernels, op)(**own), [value for value in own.values() if isinstance(value, Tensor)]

    own: Arguments = {}

    def fresh() -> Any:
        for name, value in given.items():  # in place: no tensor is made under the setting
            if name in own and isinstance(value, Tensor):
                own[name].copy_(value)
        return run()

    own.update(copied(given))
    return changes(fresh, settings)


@pytest.mark.parametrize(("op", "backend"), [(op, backend) for op in CATALOGUE for backend in on_cpu(op)])
def test_no_setting_changes_a_bit_of_an_op(op: str, backend: str) -> None:
    with OPS[op].bound_to(CPU, implementation(op, backend)):
        wrong = {label: found for label, call in calls(op) if (found := op_changes(op, call, dict(SETTINGS)))}
    assert wrong == {}


def test_they_are_all() -> None:
    assert (sum(len(on_cpu(op)) for op in CATALOGUE), sum(len(c.implementations("cpu")) for c in CONVERSIONS)) == (
        42,
        15,
    )


@pytest.mark.interpreter
@pytest.mark.parametrize("name", [name if name in TELLING else exhaustive(name) for name in SETTINGS])
@pytest.mark.parametrize("op", [op for op in CATALOGUE if OPS[op].has_triton])
def test_no_setting_changes_a_bit_of_a_triton_kernel(op: str, name: str, force: Callable[[str], None]) -> None:
    force("triton")
    call = in_order(op, CATALOGUE[op].small(Maker(torch.float32)))
    assert op_changes(op, call, {name: SETTINGS[name]}) == []


@pytest.mark.parametrize("biased", [False, True])
def test_no_setting_changes_a_bit_of_a_vendors_matmul(biased: bool) -> None:
    """It runs between Triton kernels, on a GPU alone."""
    x, weight = torch.randn(70, 256), torch.randn(192, 256)
    bias = torch.randn(192) if biased else None

    def run() -> Tensor:
        with no_autocast():  # as within the op
            VendorMatmul(x, weight, bias, out).launch()
        return out

    out = torch.empty(70, 192)
    assert changes(run, dict(SETTINGS)) == []


def conversion_arguments(name: str, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Legal arguments, made by the reference."""
    weight = torch.randn(70, 192, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes, scales, zeros = reference.quantize_int4(weight, 32, False)
    bytes_, byte_scales = reference.quantize_int8(weight, 64)
    given: dict[str, list[tuple[Any, ...]]] = {
        "quantize_int4": [(weight, 32, True), (weight, 32, False)],
        "dequantize_int4": [(codes, scales, zeros), (codes, scales, None)],
        "pack_int4": [(codes,)],
        "unpack_int4": [(reference.pack_int4(codes), 70, 192)],
        "quantize_int8": [(weight, 64)],
        "dequantize_int8": [(bytes_, byte_scales)],
        "pack_int8": [(bytes_,)],
        "unpack_int8": [(reference.pack_int8(bytes_), 70, 192)],
        "pack_bf12": [(weight.bfloat16(),)],
        "unpack_bf12": [reference.pack_bf12(weight.bfloat16())],
    }
    return given[name]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("conversion", CONVERSIONS, ids=lambda conversion: conversion.name)
def test_no_setting_changes_a_bit_of_a_conversion(
    monkeypatch: pytest.MonkeyPatch, conversion: Conversion, backend: str
) -> None:
    monkeypatch.setenv("FASTLLAMA_BACKEND", backend)
    for dtype in DTYPES:
        for args in conversion_arguments(conversion.name, dtype):
            assert changes(functools.partial(conversion, *args), dict(SETTINGS)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_no_setting_changes_a_bit_of_the_cos_sin_cache(dtype: torch.dtype) -> None:
    inv_freq = (10000.0 ** -(torch.arange(8) / 8)).to(dtype)
    assert changes(lambda: kernels.cos_sin_cache(inv_freq, 100), dict(SETTINGS)) == []


def workspaces() -> dict[str, Callable[[], Tensor]]:
    """The scratch memory that each function allocates; in the interpreter it has elements."""
    x, weight = torch.randn(4, 256), torch.randn(96, 256)
    codes, scales = kernels.quantize_int8(weight, 128)
    packed, packed_int4 = kernels.pack_int8(codes), kernels.pack_int4((codes + 128).byte() // 16)
    pages, table = torch.zeros(9, 2, 64, 16), torch.arange(8, dtype=torch.int32).view(1, 8)
    q, x_codes = torch.randn(1, 4, 16), codes[:4]
    return {
        "attention_workspace": lambda: kernels.attention_workspace(q, pages, table),
        "matmul_workspace": lambda: kernels.matmul_workspace(4, weight),
        "matmul_int4_workspace": lambda: kernels.matmul_int4_workspace(x, packed_int4, scales),
        "matmul_int8_workspace": lambda: kernels.matmul_int8_workspace(x, packed, scales),
        "matmul_w8a8_workspace": lambda: kernels.matmul_w8a8_workspace(x_codes, packed, scales[:, 0]),
        "sample_workspace": lambda: kernels.sample_workspace(x),
    }


@pytest.mark.parametrize("name", [name for name in kernels.__all__ if name.endswith("_workspace")])
@pytest.mark.parametrize("backend", ["auto", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_no_setting_changes_scratch_memory(name: str, backend: str, force: Callable[[str], None]) -> None:
    allocate = workspaces()[name]
    force(backend)
    assert changes(lambda: allocate().zero_(), dict(SETTINGS)) == []
