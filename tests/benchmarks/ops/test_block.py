"""The benchmark of a block's decode step, run in the interpreter: its launches, bytes, judgements and record."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.ops import block
from benchmarks.ops.block import Step
from fastllama.bench.ops import comparison
from fastllama.bench.ops.report import OURS
from fastllama.catalogue.sizes import TOY_CONFIG
from fastllama.layers.linear import Linear

CPU = torch.device("cpu")
LAUNCHES = ["matmul_dense_kernel", "rope_and_write_kv_kernel", "attention_decode_kernel", *3 * ["matmul_dense_kernel"]]
pytestmark = pytest.mark.interpreter


def run(monkeypatch: pytest.MonkeyPatch, path: Path, *kinds: str) -> tuple[int, dict[str, Any]]:
    monkeypatch.setattr(sys, "argv", ["block", "--dry", "--output", str(path), "--quantization", *kinds])
    status = block.main()
    return status, json.loads(path.read_text())


@pytest.fixture
def step() -> Iterator[Step]:
    with torch.no_grad(), comparison.interpreted(True):
        yield block.steps(block.copies(TOY_CONFIG, "none", CPU, 1), rows=2, context=20)[0]


def test_the_dry_run_writes_what_a_block_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, record = run(monkeypatch, tmp_path / "block.json", "none", "int4")
    assert status == 0
    assert record["environment"]["torch"] == torch.__version__
    assert record["conditions"]["quantization"] == ["none", "int4"]
    bf16, int4 = record["cases"]
    own, torchs = (bf16["contenders"][name] for name in (OURS, block.TORCH))
    numbers = 64 * (64 + 2 * 32) + 64 * 64 + 64 * 192 + 96 * 64 + 2 * 64  # qkv, o, gate and up, down, the norms
    keys_and_values = 3 * 73 * 2 * 32
    assert own["bytes"] == torchs["bytes"] == 2 * (numbers + keys_and_values)
    assert own["launches"] == LAUNCHES
    assert len(torchs["launches"]) > 4 * len(LAUNCHES)
    for each in (own, torchs, *int4["contenders"].values()):
        (seconds,) = each["eager"]["seconds"]
        copy = record["ceilings"]["copy_bytes_per_second"]
        assert each["eager"]["of_copy"] == pytest.approx(each["bytes"] / seconds / copy)
    assert int4["contenders"][OURS]["bytes"] < own["bytes"] == int4["contenders"][block.TORCH]["bytes"]
    assert f"{own['eager']['median'] * 1e6:.1f} us" in capsys.readouterr().out


def test_what_is_wrong_is_named_and_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def without_attention(step: Step) -> torch.Tensor:
        step.block.self_attn.forward = lambda hidden, *args: hidden
        return own(step)

    own = block.ours
    monkeypatch.setattr(block, "ours", without_attention)
    status, record = run(monkeypatch, tmp_path / "block.json", "none")
    assert status == 1
    (case,) = record["cases"]
    assert case["contenders"][OURS]["failed"].startswith("wrong: error ")
    assert "eager" not in case["contenders"][OURS]
    assert case["contenders"][block.TORCH]["eager"]["median"] > 0
    assert "fastllama failed: wrong: error " in capsys.readouterr().out


def test_a_shape_that_breaks_leaves_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def breaking(step: Step) -> torch.Tensor:
        if type(step.block.mlp.down_proj) is Linear:
            raise RuntimeError("no such launch")
        return own(step)

    own = block.ours
    monkeypatch.setattr(block, "ours", breaking)
    monkeypatch.setitem(block.CONTENDERS, OURS, breaking)
    status, record = run(monkeypatch, tmp_path / "block.json", "none", "int8")
    assert status == 1
    broken, whole = record["cases"]
    assert broken["contenders"][OURS] == {"failed": "RuntimeError: no such launch"}
    assert whole["contenders"][OURS]["eager"]["median"] > 0


@pytest.mark.parametrize("failure", [RuntimeError("no such weights"), MemoryError("too many")])
def test_a_kind_that_cannot_be_made_leaves_the_others(
    failure: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A contender that raises is recorded as a failure, one that does not fit is named."""
    right = block.copies

    def copies(config: Any, kind: str, *args: Any) -> Any:
        if kind == "int8":
            raise failure
        return right(config, kind, *args)

    monkeypatch.setattr(block, "copies", copies)
    status, record = run(monkeypatch, tmp_path / "block.json", "int8", "none")
    fits = isinstance(failure, RuntimeError)
    assert status == fits
    assert [case["quantization"] for case in record["cases"]] == ["int8", "none"][not fits :]
    assert record["cases"][-1]["contenders"][OURS]["eager"]["median"] > 0
    if fits:
        assert record["cases"][0]["contenders"][OURS] == {"failed": "RuntimeError: no such weights"}
    else:
        assert record["skipped"] == ["toy, int8: its weights do not fit in memory"]


def test_a_shape_that_does_not_fit_is_written_before_the_next(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, kept = tmp_path / "block.json", []

    def measure(*args: Any) -> Any:
        kept.append(len(json.loads(path.read_text())["skipped"]) if path.exists() else 0)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(block, "measure", measure)
    status, record = run(monkeypatch, path, "none", "int8")
    assert (status, kept, len(record["skipped"])) == (0, [0, 1], 2)


def test_a_capture_that_fails_is_a_failure() -> None:
    assert block._failure({"graph": {"failed": "capture"}, "eager": {"median": 1.0}}) == "capture"
    assert block._failure({"graph": {"median": 1.0}, "eager": {"median": 1.0}}) is None


def test_torchs_own_launches_are_counted_and_views_and_memory_are_not(step: Step) -> None:
    def call(step: Step) -> torch.Tensor:
        step.hidden[1:].zero_()
        step.hidden[:0].zero_()
        torch.empty_like(step.hidden).view(-1)
        return block.ours(step)

    assert block.launches(call, step) == ["zero_", *LAUNCHES]
    assert block.launches(call, step) == ["zero_", *LAUNCHES]  # none is missed because an op remembers it


@pytest.mark.parametrize("kind", ["none", "int8", "int4"])
def test_copies_hold_so_many_bytes(kind: str) -> None:
    with torch.no_grad():
        models = block.copies(TOY_CONFIG, kind, CPU, 100_000)
    one = block.kept_bytes(models[0].layers[0])
    assert len(models) == -(-100_000 // one) > 1
    assert {len(model.layers) for model in models} == {1}


def test_without_a_gpu_only_the_dry_run_is_offered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["block"])
    with pytest.raises(SystemExit):
        block.main()
    assert "no GPU here; --dry walks a toy shape" in capsys.readouterr().err
