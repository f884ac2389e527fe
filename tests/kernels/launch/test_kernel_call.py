"""Repeated launches skip planning, with the kernels, numbers and addresses that planning would give."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from fastllama import kernels
from fastllama.catalogue.arguments import positional
from fastllama.catalogue.table import small_call
from fastllama.kernels.dispatch.backends import Function
from fastllama.kernels.dispatch.op import OPS
from fastllama.kernels.launch import heuristics, tuning
from fastllama.kernels.launch.kernel_call import KernelCall, launcher
from fastllama.kernels.triton.sampling.draw import workspace_size
from fastllama.testing.drivers import DryLaunch, dry_run
from fastllama.testing.recorder import record
from fastllama.testing.targets import TARGETS

pytestmark = pytest.mark.compile
TRITON_OPS = [name for name, op in OPS.items() if op.has_triton]


@pytest.fixture
def launches() -> Iterator[list[DryLaunch]]:
    """All launches that reach a fake driver."""
    with dry_run(TARGETS["sm_90"]) as noted:
        yield noted


def call(op: str) -> dict[str, Any]:
    """Every argument by name, tensors fresh; matmuls in bf16, where one kernel does all."""
    given = small_call(op)
    if "gated" in given:
        given = {name: value.bfloat16() if is_float(value) else value for name, value in given.items()}
    if op == "sample":
        given["workspace"] = torch.empty(workspace_size(given["logits"]), dtype=torch.int64)
    return given


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def launched(launches: list[DryLaunch], op: str, run: Function, given: dict[str, Any]) -> list[DryLaunch]:
    launches.clear()
    run(*positional(op, given))
    return launches.copy()


def misaligned(value: Tensor) -> Tensor:
    """An equal tensor at an address that is a multiple of 4, as packed 8-bit weights must be, and not of 16."""
    skipped = max(4 // value.itemsize, 1)
    moved = torch.empty(value.numel() + skipped, dtype=value.dtype)[skipped:].view(value.shape)
    return moved.copy_(value)


@pytest.mark.parametrize("op", TRITON_OPS)
def test_repeated_launches_are_those_that_planning_gives(op: str, launches: list[DryLaunch]) -> None:
    plan = OPS[op].launcher("cuda")
    again = plan(*positional(op, call(op)))
    assert again is not None
    for _ in range(2):
        given = call(op)
        planned = launched(launches, op, plan, given)
        assert planned
        assert launched(launches, op, again, given) == planned


@pytest.mark.parametrize("op", TRITON_OPS)
def test_an_address_that_is_not_aligned_is_planned(op: str, launches: list[DryLaunch]) -> None:
    """For another kernel, as the one for aligned addresses would read 16 bytes at once."""
    plan = OPS[op].launcher("cuda")
    again = plan(*positional(op, call(op)))
    assert again is not None
    for name, value in call(op).items():
        if isinstance(value, Tensor) and value.numel():
            given = call(op) | {name: misaligned(value)}
            planned = launched(launches, op, plan, given)
            assert launched(launches, op, again, given) == planned


@pytest.mark.parametrize("op", TRITON_OPS)
def test_the_environment_does_not_choose_the_rounding(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rounding of `a * b + c`, for which Triton has a variable, and a default that 3.10 changes."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    with record(TARGETS["sm_90"]) as recorded:
        OPS[op].launcher("cuda")(*positional(op, call(op)))
    assert recorded
    assert all(launch.options["enable_fp_fusion"] for launch in recorded)


def test_a_call_that_is_not_aligned_gives_nothing_to_repeat(launches: list[DryLaunch]) -> None:
    given = call("rms_norm")
    assert OPS["rms_norm"].launcher("cuda")(*(given | {"x": misaligned(given["x"])}).values()) is None
    assert len(launches) == 1


@pytest.mark.parametrize("op", TRITON_OPS)
def test_the_public_op_plans_once(op: str, launches: list[DryLaunch], monkeypatch: pytest.MonkeyPatch) -> None:
    run = OPS[op].launcher("cuda")
    planned: list[DryLaunch] = []

    def planning(*args: Any) -> Function | None:
        planned.append(run)
        return run(*args)

    with torch.inference_mode(), OPS[op].bound_to(torch.device("cpu"), planning):
        for _ in range(3):
            given = call(op)
            launches.clear()
            getattr(kernels, op)(**given)
            seen = launches.copy()
            assert seen == launched(launches, op, run, given)
    assert len(planned) == 1


@pytest.mark.parametrize("op", ["attention_prefill", "attention_decode"])
def test_a_part_of_a_batch_is_repeated_wherever_it_begins(op: str, launches: list[DryLaunch]) -> None:
    """Tables of prompts begin where those of decodes end: one kernel, as these are read one number at a time."""
    plan = OPS[op].launcher("cuda")
    moved = {name: misaligned(value) for name, value in call(op).items() if name in ("page_table", "seq_lens")}
    for first, second in ((moved, {}), ({}, moved)):
        again = plan(*positional(op, call(op) | first))
        assert again is not None
        given = call(op) | second
        planned = launched(launches, op, plan, given)
        assert launched(launches, op, again, given) == planned
        with mock.patch.object(JITFunction, "run", side_effect=AssertionError("planned")):
            again(*positional(op, given))


def test_rows_of_any_rank_and_in_place(launches: list[DryLaunch]) -> None:
    run = OPS["add_rms_norm"].launcher("cuda")
    weight = torch.randn(64)
    with torch.inference_mode(), OPS["add_rms_norm"].bound_to(torch.device("cpu"), run):
        for _ in range(3):
            x, residual = torch.randn(2, 3, 64), torch.randn(2, 3, 64)
            launches.clear()
            kernels.add_rms_norm(x, residual, weight, out=x, residual_out=residual)
            (seen,) = launches
            addresses = [residual.data_ptr() if place % 2 else x.data_ptr() for place in range(4)]
            assert list(seen.arguments[:5]) == [*addresses, weight.data_ptr()]
            kernels.add_rms_norm(x, residual, weight)  # not in place: of another kind
            assert launches[1].arguments[0] not in addresses


@triton.jit
def _fill_kernel(out_ptr, part_ptr, VALUE: tl.constexpr):
    tl.store(out_ptr, VALUE)
    tl.store(part_ptr, VALUE)


@launcher
def _fill(out: Tensor, hidden: list[Tensor], workspace: Tensor) -> list[KernelCall]:
    """Hidden arguments are not the op's own, and may be in the workspace or not."""
    return [KernelCall(_fill_kernel, (1,), out_ptr=out, part_ptr=hidden[0], VALUE=1)]


def test_memory_that_is_not_the_ops_is_never_repeated(launches: list[DryLaunch]) -> None:
    """It may have been freed."""
    out, memory = torch.empty(8), torch.empty(3, 16)
    for inside in (memory[1], memory[1, 4:]):
        assert _fill(out, [inside], memory[1]) is not None
    for stranger in (memory[0], memory[2], memory[1].clone()):
        assert _fill(out, [stranger], memory[1]) is None
    assert len(launches) == 5


def test_a_part_whose_address_is_aligned_by_chance_is_never_repeated(launches: list[DryLaunch]) -> None:
    """In another workspace it would not be aligned."""
    out, memory = torch.empty(8), torch.empty(16)
    assert _fill(out, [memory[4:]], memory) is not None
    assert _fill(out, [memory[4:]], memory[2:]) is None


def test_no_launch_is_repeated_as_none(launches: list[DryLaunch]) -> None:
    empty = {"gate_up": torch.empty(0, 8), "up": None, "out": torch.empty(0, 4)}
    again = OPS["silu_mul"].launcher("cuda")(*empty.values())
    assert again is not None
    assert launched(launches, "silu_mul", again, empty) == []


def test_parts_in_a_workspace_are_repeated(launches: list[DryLaunch]) -> None:
    launch = heuristics.QuantizedMatmulLaunch(splits=2, stages=2, num_warps=4)
    with mock.patch.object(tuning, "int4", return_value=launch):
        plan, given = OPS["matmul_int4"].launcher("cuda"), call("matmul_int4")
        again = plan(*positional("matmul_int4", given | {"workspace": torch.zeros(8192)}))
        assert again is not None
        given = call("matmul_int4") | {"workspace": torch.zeros(9000)}
        planned = launched(launches, "matmul_int4", plan, given)
        assert len(planned) == 1
        assert launched(launches, "matmul_int4", again, given) == planned


def test_a_workspace_that_the_launcher_makes_is_not_repeated(launches: list[DryLaunch]) -> None:
    assert OPS["sample"].launcher("cuda")(*(call("sample") | {"workspace": None}).values()) is None
    assert len(launches) == 6
