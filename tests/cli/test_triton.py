"""The commands on the Triton kernels, chosen as a user chooses them, in the interpreter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fastllama.cli import info
from fastllama.kernels.dispatch.backends import Function
from fastllama.kernels.dispatch.op import OPS, Op
from tests.cli.conftest import Command
from tests.cli.models import write_model
from tests.rounds import exhaustive

TRITON_OPS = {name for name, op in OPS.items() if op.has_triton}
# The ops of a step in fp32; residual sums and SwiGLU are fused with matmuls, SwiGLU with unquantized ones alone.
USED = {"embedding", "rms_norm", "matmul", "rope_and_write_kv", "attention_prefill", "attention_decode", "sample"}
STORY = ("generate", "--prompt", "Once upon a time", "--dtype", "float32", "--temperature", "0", "--json")

Force = Callable[[str], None]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The ops whose Triton kernels have run in the test."""
    names: set[str] = set()
    launcher = Op.launcher

    def noting(op: Op, device: str) -> Function:
        run = launcher(op, device)

        def launch(*args: object) -> Function | None:
            names.add(op.name)
            again: Function | None = run(*args)
            return again

        return launch

    monkeypatch.setattr(Op, "launcher", noting)
    return names


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("packaged", "quantization", "count", "products"),
    [
        (True, "none", 3, set()),
        (False, "int4", 3, {"matmul_int4", "silu_mul"}),
        exhaustive(True, "none", 16, set()),
        exhaustive(True, "int4", 3, {"matmul_int4", "silu_mul"}),
    ],
)
def test_generate_writes_what_the_reference_writes(
    command: Command,
    force: Force,
    ran: set[str],
    model: str,
    packaged: bool,
    quantization: str,
    count: int,
    products: set[str],
) -> None:
    """A token of the packaged model takes the interpreter 2 s."""
    story = (*STORY, *(() if packaged else ("--model", model)), "--max-tokens", str(count), "--quantize", quantization)
    force("reference")
    expected = json.loads(command(*story).out)["token_ids"]
    assert (len(expected), ran) == (count, set())
    force("triton")
    done = command(*story)
    assert (done.status, done.err) == (0, "")
    found = json.loads(done.out)
    assert found["token_ids"] == expected
    assert found["backend"].startswith(f"{len(TRITON_OPS)} triton, ")
    assert ran == USED | products


@pytest.mark.interpreter
def test_verify_covers_every_op(command: Command, tmp_path: Path, force: Force, ran: set[str]) -> None:
    """In 16 bits verify also judges whether tokens that differ are ties. Stock, bf16 fails it."""
    model = write_model(tmp_path / "model", num_hidden_layers=1)
    force("triton")
    done = command("verify", "--model", model, "--dtype", "bfloat16", "--json")
    found = json.loads(done.out)
    assert (done.status, done.err) == (0, ""), found["summary"]
    backends = {row["name"]: row["backend"] for row in found["rows"] if row["kind"] == "op"}
    assert set(backends) == set(OPS)
    assert {name for name, backend in backends.items() if backend == "triton"} == TRITON_OPS == ran


@pytest.mark.interpreter
def test_the_interpreter_is_repaired_while_a_command_runs(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastllama.testing.interpreter import RepairedBuilder
    from fastllama.testing.triton_api import interpreter

    repaired = []

    def run(args: object) -> int:
        repaired.append(isinstance(interpreter.interpreter_builder, RepairedBuilder))
        return 0

    monkeypatch.setattr(info, "run", run)
    assert command("info").status == 0
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert command("info").status == 0
    assert repaired == [True, False]
