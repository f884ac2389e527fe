"""Contract: every op has a documented public function, a reference of the same inputs, legal calls and a test."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from types import FunctionType

import pytest
import torch

from fastllama import kernels
from fastllama.catalogue.arguments import positional
from fastllama.catalogue.llama_calls import toy_calls
from fastllama.catalogue.table import CATALOGUE, small_call
from fastllama.kernels import reference
from fastllama.kernels.dispatch.backends import Backends
from fastllama.kernels.dispatch.op import OPS
from fastllama.kernels.ops.compiled import numba_kernels, triton_kernels

OPS_FOLDER = Path(kernels.__file__).parent / "ops"
TESTS = Path(__file__).parents[1] / "kernels"
# Public functions that are not ops, and why.
HELPERS = {
    "attention_workspace": "allocates scratch memory for attention_decode",
    "backend_of": "returns the implementation of each op",
    "cos_sin_cache": "builds once, in fp32, the table that rope reads",
    "matmul_workspace": "allocates scratch memory for matmul",
    "pack_bf12": "packs a weight for matmul_bf12",
    "unpack_bf12": "its inverse",
    "quantize_int4": "rounds a weight to 4-bit values, scales and zeros",
    "dequantize_int4": "its inverse, but for the rounding",
    "pack_int4": "packs 4-bit values for matmul_int4",
    "unpack_int4": "its inverse",
    "matmul_int4_workspace": "allocates scratch memory for matmul_int4",
    "quantize_int8": "rounds a weight to 8-bit values and scales",
    "dequantize_int8": "its inverse, but for the rounding",
    "pack_int8": "packs 8-bit values for matmul_int8",
    "unpack_int8": "its inverse",
    "matmul_int8_workspace": "allocates scratch memory for matmul_int8",
    "matmul_w8a8_workspace": "allocates scratch memory for matmul_w8a8",
    "sample_workspace": "allocates scratch memory for sample",
}
DTYPE = re.compile(r"\b(fp64|fp32|fp16|bf16|int64|int32|int8|dtype)\b")
SHAPE = re.compile(r"\w+: \[[^\]]+\]")
REFERENCE_TO = re.compile(r"as (?:for )?`(\w+)`")


def names(function: FunctionType) -> list[str]:
    return list(inspect.signature(function).parameters)


def inputs_and_outputs(op: str) -> tuple[list[str], list[str]]:
    """The argument names of an op's schema without its scratch memory: inputs, and outputs, which come last."""
    arguments = [argument.name for argument in getattr(torch.ops.fastllama, op).default._schema.arguments]
    arguments = [name for name in arguments if name != "workspace"]
    count = len(arguments) - OPS[op].num_outputs
    return arguments[:count], arguments[count:]


def test_public_functions_and_ops_are_the_same() -> None:
    functions = {name for name in kernels.__all__ if isinstance(getattr(kernels, name), FunctionType)}
    assert functions - set(HELPERS) == set(OPS)
    assert set(HELPERS) <= functions


def test_a_compilers_table_has_exactly_the_ops_that_use_it() -> None:
    """A kernel without an op is unused; an op without its kernel fails at its first call."""
    modules = [importlib.import_module(f"fastllama.kernels.ops.{path.stem}") for path in OPS_FOLDER.glob("*.py")]
    bound = {value.name: value for module in modules for value in vars(module).values() if isinstance(value, Backends)}
    assert set(OPS) <= set(bound)
    assert {name for name, value in bound.items() if value._numba} == set(numba_kernels())
    assert {name for name, value in bound.items() if value._triton} == set(triton_kernels())


@pytest.mark.parametrize("op", OPS)
def test_it_has_a_reference_of_the_same_inputs(op: str) -> None:
    assert op in reference.__all__
    assert names(getattr(reference, op)) == inputs_and_outputs(op)[0]


@pytest.mark.parametrize("op", OPS)
def test_its_function_adds_only_outputs(op: str) -> None:
    inputs, outputs = inputs_and_outputs(op)
    parameters = inspect.signature(getattr(kernels, op)).parameters
    assert [name for name in parameters if name in inputs] == inputs
    added = {name: parameter for name, parameter in parameters.items() if name not in inputs}
    assert set(added) <= {
        *outputs,
        *(f"return_{name.removesuffix('_out')}" for name in outputs),
        "workspace",
        "deterministic",
    }
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in added.values())
    assert all(parameter.default in (None, False) for parameter in added.values())


@pytest.mark.parametrize("op", OPS)
def test_its_defaults_are_the_references(op: str) -> None:
    public = inspect.signature(getattr(kernels, op)).parameters
    for name, parameter in inspect.signature(getattr(reference, op)).parameters.items():
        if parameter.default is not parameter.empty:
            assert public[name].default == parameter.default, name


@pytest.mark.parametrize("op", OPS)
def test_its_docstring_is_a_contract(op: str) -> None:
    """Every parameter described (or left to another op's docstring, named), shapes, dtypes, errors and source."""
    own = inspect.getdoc(getattr(kernels, op)) or ""
    text, todo, seen = "", [op], set()
    while todo:
        name = todo.pop()
        seen.add(name)
        docstring = inspect.getdoc(getattr(kernels, name)) or ""
        text += docstring
        todo += [other for other in REFERENCE_TO.findall(docstring) if other not in seen]
    assert SHAPE.search(own), "no shape like `x: [..., H]`"
    assert DTYPE.search(own), "no dtype"
    assert "Returns" in text or "returns" in text
    assert "Raises ValueError" in own
    assert re.search(r"^Source: \S", own, re.MULTILINE), "no line `Source: ...`"
    assert [name for name in names(getattr(kernels, op)) if not re.search(rf"\b{name}\b", text)] == []


@pytest.mark.parametrize("op", OPS)
def test_its_errors_list_each_legal_dtype_once(op: str) -> None:
    """Where x's dtype or fp32 is legal, and x is fp32, that is one dtype."""
    call = small_call(op)
    for name, value in call.items():
        if isinstance(value, torch.Tensor):
            wrong = value.to(torch.int16 if value.is_floating_point() else torch.float32)
            with pytest.raises(TypeError, match="has dtype") as raised:
                getattr(kernels, op)(**(call | {name: wrong}))
            legal = str(raised.value).partition("; legal: ")[2].split(", ")
            assert legal == [*dict.fromkeys(legal)], f"{name}: {raised.value}"


@pytest.mark.parametrize("op", OPS)
def test_it_has_a_test(op: str) -> None:
    called = re.compile(rf"\b{op}\b")
    assert any(called.search(path.read_text(encoding="utf-8")) for path in TESTS.rglob("test_*.py")), f"no test of {op}"


def test_the_catalogue_has_every_op() -> None:
    assert set(CATALOGUE) == set(OPS), "give it an entry in fastllama/catalogue/table.py"


@pytest.mark.parametrize("op", OPS)
def test_its_calls_in_the_catalogue_are_legal(op: str) -> None:
    llamas = [call.make(torch.device("cpu"), seed=0) for call in toy_calls(torch.bfloat16, (op,))]
    for call in (small_call(op), *llamas):
        OPS[op].check(positional(op, call))
