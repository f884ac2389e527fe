"""The plan of `make gpu`: its order, its budget, and that nothing which fails is passed over."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import micro, run
from benchmarks.registry import Case
from fastllama.cli.main import _parser

CEILINGS = {"copy_bytes_per_second": 1.0, "bf16_flops_per_second": 1.0}


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`run.main` on a clock that gains a minute for each case, with everything slow replaced."""
    clock = itertools.count(0.0, 30.0)  # read before and after each case
    measured: list[Case] = []

    def measure(case: Case, device: torch.device, rounds: int) -> dict[str, Any]:
        measured.append(case)
        shape = {"op": case.op, "label": case.label, "backend": "", "bytes": 1, "flops": 0}
        return {**shape, "contenders": {micro.OURS: dict(found.ours)}}

    found = SimpleNamespace(
        measured=measured, ours={"eager": {"median": 1.0}}, tests=run.NO_TEST_RAN, launches={}, block={}, decode={}
    )
    monkeypatch.setattr(run.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(micro, "measure", measure)
    monkeypatch.setattr(run, "ceilings", lambda device, toy: CEILINGS)
    monkeypatch.setattr(micro, "interpreted", lambda wanted: micro.nullcontext())
    monkeypatch.setattr(run, "run_tests", lambda out, seconds: {"outcome": "", "status": found.tests})
    monkeypatch.setattr(run, "run_launch_overhead", lambda out, rounds: {"ops": {}, **found.launches})

    monkeypatch.setattr(run, "run_block", lambda out, seconds, dry: {"cases": [], **found.block})

    monkeypatch.setattr(run, "run_decode", lambda out, seconds, dry: {"cases": [], **found.decode})

    def main(*options: str) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["run", "--dry", "--out", str(tmp_path), *options])
        status = run.main()
        assert (tmp_path / "report.md").read_text().startswith("# ")
        return status, json.loads((tmp_path / "bench.json").read_text())

    found.main = main
    return found


def test_what_the_time_does_not_allow_is_named(stage: Any) -> None:
    status, record = stage.main("--minutes", "4", "--ops", "rms_norm", "silu_mul", "matmul", "embedding", "rope")
    assert status == 0
    assert len(record["cases"]) == len(stage.measured)
    assert 1 <= len(record["cases"]) < 5
    assert len(record["cases"]) + len(record["skipped"]) == 5
    assert all(text.endswith("no time left") for text in record["skipped"])


def test_the_record_holds_conditions_and_environment(stage: Any) -> None:
    _, record = stage.main("--minutes", "100", "--dtype", "float16")
    assert record["conditions"] == {"minutes": 100.0, "ops": list(run.OPS), "dtype": "float16", "dry": True}
    assert record["environment"]["torch"] == torch.__version__
    assert {case.dtype for case in stage.measured} == {torch.float16}
    assert record["skipped"] == []


def test_ops_with_a_kernel_come_first(stage: Any) -> None:
    stage.main("--minutes", "100")
    slow = [micro.implementation(case.op, torch.device("cpu")).backend == "reference" for case in stage.measured]
    assert slow == sorted(slow)
    assert {case.op for case in stage.measured} == set(run.OPS)


def test_what_does_not_fit_in_memory_is_named(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(case: Case, device: torch.device, rounds: int) -> dict[str, Any]:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(micro, "measure", measure)
    _, record = stage.main("--minutes", "100", "--ops", "rms_norm")
    assert record["skipped"] == ["rms_norm, toy, 3 rows: does not fit in memory"]


def test_a_failure_of_ours_or_of_a_step_is_the_runs(stage: Any) -> None:
    assert stage.main("--ops", "rms_norm", "--minutes", "100")[0] == 0
    stage.tests = 1
    assert stage.main("--ops", "rms_norm", "--minutes", "100")[0] == 1
    stage.tests, stage.launches = None, {"failed": "status 1"}
    assert stage.main("--ops", "rms_norm", "--minutes", "100")[0] == 1
    stage.launches, stage.block = {}, {"failed": "status 1"}
    assert stage.main("--ops", "rms_norm", "--minutes", "100")[0] == 1
    stage.block, stage.decode = {}, {"failed": "status 1"}
    assert stage.main("--ops", "rms_norm", "--minutes", "100")[0] == 1
    stage.decode, stage.ours = {"not_run": "for lack of tqdm"}, {}
    assert stage.main("--ops", "rms_norm", "--minutes", "100")[0] == 0
    stage.ours = {"failed": "wrong"}
    assert stage.main("--ops", "rms_norm", "--minutes", "100")[0] == 1


def test_without_a_gpu_only_the_dry_run_is_offered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["run", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        run.main()
    assert "no GPU here; --dry walks the plan" in capsys.readouterr().err


def test_missing_test_tools_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None if name == "hypothesis" else True)
    assert run.run_tests(tmp_path, 1.0) == {"outcome": "not run, for lack of hypothesis", "status": None}


def test_a_block_that_is_cut_short_or_fails_keeps_what_it_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ended: int | None = None

    def step(command: list[str], log: Path, seconds: float) -> int | None:
        assert "--dry" in command
        Path(command[command.index("--output") + 1]).write_text('{"cases": [1]}')
        return ended

    monkeypatch.setattr(run, "_step", step)
    assert run.run_block(tmp_path, 9.0, dry=True) == {"cases": [1], "cut_short": "cut short after 9 s"}
    ended = 1
    assert run.run_block(tmp_path, 9.0, dry=True) == {"cases": [1], "failed": "status 1, see block.txt"}
    ended = 0
    assert run.run_block(tmp_path, 9.0, dry=True) == {"cases": [1]}
    monkeypatch.setattr(run, "_step", lambda *step: 1)  # before it wrote anything: the file is of an earlier run
    assert run.run_block(tmp_path, 9.0, dry=True) == {"cases": [], "failed": "status 1, see block.txt"}


def test_decode_steps_are_measured_by_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a process of its own, at a tiny shape: what it wrote is in the record and in the report."""
    found = run.run_decode(tmp_path, 300.0, dry=True)
    assert "failed" not in found, (tmp_path / "decode.txt").read_text()
    assert [(case["batch"], case["context"]) for case in found["cases"]] == [(1, 80), (2, 80)]
    assert found["conditions"]["model"] == "tiny"
    assert "of a copy" in (tmp_path / "decode.txt").read_text()
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None if name == "tqdm" else True)
    assert run.run_decode(tmp_path, 9.0, dry=True) == {"cases": [], "not_run": "not run, for lack of tqdm"}


def test_what_is_measured_on_a_gpu_is_what_the_command_takes() -> None:
    args = _parser().parse_args(["bench", "decode", *run.DECODE.split()])
    assert (args.shape, args.quantize, args.batch, args.context) == ("7b", ["none", "int4"], [1, 32], [512, 4096])


def test_a_step_that_takes_too_long_is_cut_short(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert run._step([sys.executable, "-c", "import time; time.sleep(60)"], log, 0.1) is None
    assert run._step([sys.executable, "-c", "print('said'); raise SystemExit(3)"], log, 60) == 3
    assert log.read_text() == "said\n"
