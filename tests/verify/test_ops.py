"""Op by op: every op has cases, the right one passes in every dtype, and a wrong one of any kind does not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama.kernels.dispatch.op import OPS
from fastllama.verify import ops
from fastllama.verify.case import FormulaCase
from fastllama.verify.cases import all_cases
from fastllama.verify.report import Row

torch.set_num_threads(1)

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def row_of(op: str, dtype: torch.dtype = torch.float32) -> Row:
    """The verdict on one op alone."""
    cases = [case for case in CASES[dtype] if case.op == op]
    return max((row for case in cases for row in ops._judge(case)), key=lambda row: row.strain)


Bind = Callable[[str, Callable[..., Any]], None]  # the fixture
CASES: dict[torch.dtype, list[FormulaCase]] = {dtype: list(all_cases(dtype)) for dtype in DTYPES}


def test_every_op_is_checked_and_named_once() -> None:
    """An op without a case would be counted in the summary, and never checked."""
    rows = list(ops.rows(torch.float32, CPU))
    assert sorted(row.name for row in rows) == sorted(OPS)
    assert all(row.backend == OPS[row.name].implementation("cpu").backend for row in rows)
    assert {row.kind for row in rows} == {"op"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_the_implementation_on_this_machine_agrees(op: str, dtype: torch.dtype) -> None:
    row = row_of(op, dtype)
    assert row.ok, row


@pytest.mark.parametrize("op", OPS)
def test_so_does_the_reference(op: str, bind: Bind) -> None:
    bind(op, OPS[op]._run_reference)
    row = row_of(op)
    assert row.ok, row


def spoiled(op: str, spoil: Callable[[Tensor], None], bind: Bind, output: int = 0) -> None:
    """Spoil one output of an op, 0 or 1, by `spoil`."""
    run, first = OPS[op].implementation("cpu").run, OPS[op]._inputs

    def wrong(*args: Any) -> None:
        run(*args)
        target = args[first + output]
        if target is not None:
            spoil(target)

    bind(op, wrong)


def one_value(out: Tensor) -> None:
    """The last value of the last row is a hundredth of the row's largest too large."""
    if out.is_floating_point():
        out[-1:, ..., -1:] += 0.01 * out.abs().max()
    else:
        out[-1] = (out[-1] + 1) % 1000


def a_gap(out: Tensor) -> None:
    """The output of a kernel that leaves out its last row."""
    out[-1:] = math.nan if out.is_floating_point() else -1


@pytest.mark.parametrize("spoil", [one_value, a_gap])
@pytest.mark.parametrize("op", OPS)
def test_a_wrong_value_is_found(op: str, spoil: Callable[[Tensor], None], bind: Bind) -> None:
    spoiled(op, spoil, bind)
    assert not row_of(op).ok


@pytest.mark.parametrize("op", [name for name, op in OPS.items() if op.num_outputs == 2])
def test_a_wrong_value_in_the_second_output_is_found(op: str, bind: Bind) -> None:
    spoiled(op, one_value, bind, output=1)
    assert not row_of(op).ok


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", sorted(set(OPS) - {"sample", "embedding"}))
def test_a_factor_of_one_and_a_sixteenth_is_found_in_16_bits(op: str, dtype: torch.dtype, bind: Bind) -> None:
    def spoil(out: Tensor) -> None:
        out *= 1.0625

    spoiled(op, spoil, bind)
    assert not row_of(op, dtype).ok


def test_a_kernel_that_raises_is_named_with_its_error(bind: Bind) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("no such instruction")

    bind("rope", broken)
    row = row_of("rope")
    assert not row.ok
    assert row.case == "q [33, 8, 64], 64 rotated: RuntimeError: no such instruction"
    assert row.error == math.inf


def test_the_worst_of_several_cases_is_shown(bind: Bind) -> None:
    def spoil(out: Tensor) -> None:
        if out.shape == (7, 100):
            out[0, 0] += 1

    spoiled("rms_norm", spoil, bind)
    row = next(row for row in ops.rows(torch.float32, CPU) if row.name == "rms_norm")
    assert (row.case, row.ok) == ("x [7, 100]", False)


# Mistakes that kernels really make, as a change of one argument: (op, place of the argument, its value -> a wrong one).
MISTAKES: dict[str, tuple[str, int, Callable[[Any], Any]]] = {
    "eps forgotten": ("rms_norm", 2, lambda eps: 0.0),
    "padding written": ("rope_and_write_kv", 3, lambda slots: slots.abs()),
    "pages in order": ("attention_decode", 3, lambda table: table.sort(dim=1).values),
    "one key too few": ("attention_decode", 4, lambda lengths: (lengths - 1).clamp(min=1)),
    "scale of the decode": ("attention_decode", 5, lambda scale: 1.001 * scale),
    "pages of the prompt in order": ("attention_prefill", 3, lambda table: table.sort(dim=1).values),
    "scale of the prompt": ("attention_prefill", 6, lambda scale: 1.001 * scale),
    "not causal": ("attention_varlen", 6, lambda causal: False),
    "interleaved forgotten": ("rope", 4, lambda interleaved: False),
    "bias forgotten": ("matmul", 2, lambda bias: None),
    "temperature forgotten": ("sample", 1, torch.ones_like),
    "top-k forgotten": ("sample", 2, torch.zeros_like),
    "top-p forgotten": ("sample", 3, torch.ones_like),
    "min-p forgotten": ("sample", 4, torch.zeros_like),
    "recent tokens forgotten": ("adjust_logits", 3, torch.zeros_like),
    "rows that ask for nothing adjusted": ("adjust_logits", 4, torch.abs),
    "biases of other slots": ("adjust_logits", 5, lambda bias: bias.flip(0)),
    "prompt tokens taken for generated": ("adjust_logits", 6, lambda counts: counts + counts % 2),
    "repetition penalty forgotten": ("adjust_logits", 7, torch.ones_like),
    "presence penalty forgotten": ("adjust_logits", 8, torch.zeros_like),
    "one frequency penalty for all": ("adjust_logits", 9, lambda penalty: penalty[:1].expand(len(penalty)).clone()),
    "one number for all": ("sample", 6, torch.zeros_like),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_likely_mistake_is_found(name: str, bind: Bind) -> None:
    op, place, change = MISTAKES[name]
    run = OPS[op].implementation("cpu").run

    def wrong(*args: Any) -> None:
        run(*args[:place], change(args[place]), *args[place + 1 :])

    bind(op, wrong)
    assert not row_of(op).ok
