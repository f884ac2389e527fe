"""One compiled kernel serves every number of rows, sequences and pages: these are no part of its cache key.

Triton compiles a kernel for each value of a constexpr, and for whether an integer is 1 or a pointer or an integer is a
multiple of 16. A request that asks for a variant which warm-up did not would wait about a second for a compiler.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama.arithmetic import power_of_2
from fastllama.catalogue.arguments import positional
from fastllama.catalogue.table import T, small_call
from fastllama.kernels.dispatch.op import OPS
from fastllama.testing import triton_api
from fastllama.testing.recorder import Launch, record
from fastllama.testing.targets import TARGETS
from tests.kernels.triton.launches import SHIPPED, on

pytestmark = pytest.mark.compile
TRITON_OPS = [name for name, op in OPS.items() if op.has_triton]
ROWS = (1, 2, 3, 4, 16, 17, 18, 24, 31, 32, 33, 48, 63, 64)
WIDTHS = (1, 2, 3, 16, 17, 64, 80, 160, 1170)  # pages of 7 tokens: of one split of 512, two, three and sixteen


def sized(op: str, rows: int, width: int = 2) -> dict[str, Any]:
    """A call of so many rows or sequences, and tables of `width` pages; matmuls in bf16, where one kernel does all."""
    given = small_call(op)
    for name, value in given.items():
        if not isinstance(value, Tensor):
            continue
        if name == "page_table":
            given[name] = torch.zeros(rows, width, dtype=value.dtype)
        elif value.shape[0] == T:
            given[name] = value[:1].expand(rows, *value.shape[1:]).contiguous()
        elif name.startswith("cu_seqlens"):
            given[name] = torch.arange(rows + 1, dtype=value.dtype)
        if "gated" in given and value.is_floating_point():
            given[name] = given[name].bfloat16()
    return given


def shifted(value: Any) -> Any:
    """Integers of rows or sequences at an address that is not a multiple of 16, as in a slice of a batch."""
    if not isinstance(value, Tensor) or value.dtype not in (torch.int32, torch.int64) or value.dim() > 2:
        return value
    return torch.cat([value.new_zeros(1), value.flatten()])[1:].view(value.shape)


def launched(op: str, given: dict[str, Any], target: str = "sm_90") -> list[Launch]:
    with on(target), record(TARGETS[target]) as launches:
        OPS[op].launcher("cuda")(*positional(op, given))
    return launches


def chosen(launch: Launch) -> Hashable:
    """The constants that a launcher compiles a kernel for."""
    params, constants = launch.source.fn.params, launch.source.constants
    values = sorted((path, repr(value)) for path, value in constants.items() if params[path[0]].is_constexpr)
    return launch.kernel, *values, *sorted((name, repr(value)) for name, value in launch.options.items())


def found(launch: Launch) -> Hashable:
    """The rest of Triton's key: types, multiples of 16, integers that are 1."""
    params, source = launch.source.fn.params, launch.source
    types = [kind for kind, param in zip(source.signature.values(), params, strict=True) if not param.is_constexpr]
    ones = sorted((path, repr(value)) for path, value in source.constants.items() if not params[path[0]].is_constexpr)
    return launch.kernel, *types, *ones, repr(sorted(source.attrs.items()))


@pytest.mark.parametrize("op", TRITON_OPS)
def test_rows_decide_nothing_within_a_bucket(op: str) -> None:
    """Beyond it rows decide tiles and warps alone: a row's kernel differs by these, or not at all."""
    kinds, buckets = defaultdict(set), defaultdict(set)
    for rows in ROWS:
        launches = launched(op, sized(op, rows))
        assert launches
        buckets[power_of_2(rows)].add(tuple(map(chosen, launches)))
        for launch in launches:
            kinds[launch.kernel].add(found(launch))
    assert {rows: len(keys) for rows, keys in buckets.items()} == dict.fromkeys(buckets, 1)
    assert {kernel: len(keys) for kernel, keys in kinds.items()} == dict.fromkeys(kinds, 1)


@pytest.mark.parametrize("op", [op for op in TRITON_OPS if "page_table" in OPS[op].names])
def test_neither_does_the_width_of_a_table(op: str) -> None:
    """Except whether keys are split at all: partial results are in fp32."""
    keys = {
        (len(launches), *((chosen(launch), found(launch)) for launch in launches))
        for width in WIDTHS
        for launches in [launched(op, sized(op, 2, width))]
    }
    assert len(keys) == (2 if op == "attention_decode" else 1)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("op", TRITON_OPS)
def test_where_a_batchs_whole_numbers_lie_decides_nothing(op: str, target: str) -> None:
    """Integers of prompts begin where those of decodes end. Packed weights and counts are separate tables."""
    given = sized(op, 3)
    moved = {
        name: shifted(value) if name != "counts" and "packed" not in name else value for name, value in given.items()
    }
    both = [[(chosen(launch), found(launch)) for launch in launched(op, each, target)] for each in (given, moved)]
    assert both[0] == both[1]


KINDS = [
    ("rope", "rope 7B bf16 {}"),
    ("rope", "rope_and_write_kv 7B bf16 {}, pages bf16"),
    ("rope", "rope_and_write_kv 7B bf16 {}, pages int8"),
    ("swiglu", "silu_mul 7B bf16 {}"),
]
ARITHMETIC = re.compile(
    r"^\s*(?:@\S+\s+)?((?:add|sub|mul|fma|neg|div|rcp|ex2|rsqrt)\.[\w.:]*(?:f32|bf16x?2?|f16x?2?))\s", re.M
)
TILED = [
    *((family, kind.format("decode"), kind.format("prefill")) for family, kind in KINDS),
    ("matmul", "matmul 7B gate_up bf16, 1 rows, norm, gated", "matmul 7B gate_up bf16, 32 rows, norm, gated"),
    ("matmul", "matmul 7B down bf16, 1 rows, residual", "matmul 7B down bf16, 64 rows, residual"),
]


@pytest.mark.parametrize(("family", "few", "many"), TILED, ids=[few for _, few, _ in TILED])
def test_what_rows_still_decide_changes_no_arithmetic(family: str, few: str, many: str) -> None:
    """The tile of a program: compilers contract the same multiplications and additions, so that a row keeps its bits.

    Strides are specialised on as well, by what an address is a multiple of; a model has one of each.
    """
    found = []
    for name in (few, many):
        (shipped,) = (each for each in SHIPPED[family] if each.name == name)
        with on("sm_90"), record(TARGETS["sm_90"]) as launches:
            shipped.call()
        for launch in launches:
            text = triton_api.compile_source(launch.source, launch.target.triton, launch.options).asm["ptx"]
            found.append(set(ARITHMETIC.findall(text)))
    assert found[0]
    assert found[0] == found[1]
