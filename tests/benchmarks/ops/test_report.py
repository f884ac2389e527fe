"""The report states the record's figures, floors and failures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import results
from benchmarks.ops import report

CEILINGS = {"copy_bytes_per_second": 4e12, "read_bytes_per_second": 3e12, "bf16_flops_per_second": 8e14}
BLOCK = {
    "label": "llama-2-7b, none, 1 rows, 512 tokens of context",
    "contenders": {
        "fastllama": {
            "launches": 6 * ["matmul_dense_kernel"],
            "graph": {"median": 1e-4, "of_read": 0.92, "of_copy": 0.87},
        },
        "torch": {
            "launches": ["mm", "silu"],
            "graph": {"failed": "a | b"},
            "eager": {"median": 1e-3, "of_read": 0.1, "of_copy": 0.1},
        },
    },
}
DECODE = {
    "name": "fastllama",
    "quantization": "int4",
    "batch": 8,
    "context": 512,
    "seconds": [0.004, 0.005, 0.006],
    "tokens_per_second": 1600.0,
    "weight_bytes": 3_600_000_000,
    "kv_bytes": 2_000_000_000.0,
    "of_read": 0.262,
    "of_copy": 0.283,
}


def contender(seconds: float) -> dict[str, Any]:
    return {"error": 1e-3, "graph": {"median": seconds}, "eager": {"median": 2 * seconds}}


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., str]:
    """`written(**stages)`: the report of a run; a stage's lines in place of those here, None for none."""
    cases = [
        {
            "op": "rms_norm",
            "label": "llama-2-7b, 8192 rows",
            "backend": "triton",
            "bytes": 134_217_728,
            "flops": 0,
            "contenders": {
                "fastllama": contender(40e-6),
                "torch eager": contender(400e-6),
                "torch.compile": contender(50e-6),
                "liger-kernel": {"failed": "ImportError: a | b"},
            },
        },
        {
            "op": "sample",
            "label": "llama-2-7b, 64 rows",
            "backend": "reference",
            "bytes": 4_000_000,
            "flops": 0,
            "contenders": {"fastllama": {"failed": "wrong: error 1, bound 0"}, "torch eager": contender(1e-3)},
        },
    ]
    environment = {"device": "NVIDIA H200", "fastllama": "1", "commit": "c", "torch": "2", "triton": "3"}
    decode = {"cases": [DECODE], "skipped": ["fastllama, none: a | b"], "absent": {"transformers": "not installed"}}
    launches = {"ops": {"rms_norm": {"outputs given": {"median": 9.87}, "allocated": {"median": 12.34}}}}
    usual: dict[str, list[dict[str, Any]]] = {
        "facts": [
            {
                "environment": {**environment, "gpu": {"name": "NVIDIA H200"}},
                "libraries": {"liger-kernel": "0.8.5", "vllm": None},
            }
        ],
        "ceilings": [CEILINGS],
        "decode at 512": [{"outcome": "passed", "record": decode}],
        "block": [{"outcome": "cut short", "record": {"cases": [BLOCK]}}],
        "launches": [{"outcome": "passed", "record": launches}],
        "ops": [*({"case": case} for case in cases), {"skipped": "x"}],
    }

    def report_of(**stages: list[dict[str, Any]]) -> str:
        (tmp_path / results.FILE).unlink(missing_ok=True)
        for stage, lines in (usual | {name.replace("_", " "): lines for name, lines in stages.items()}).items():
            for line in lines:
                results.append(tmp_path / results.FILE, stage=stage, **line)
        return report.markdown(tmp_path)

    return report_of


def test_ours_stands_beside_the_fastest_peer(written: Callable[..., str]) -> None:
    text = written()
    # 134 MB at 4 TB/s take 33.6 us: 84 % of 40 us; torch.compile takes 1.25 times as long
    assert "| rms_norm (triton) | llama-2-7b, 8192 rows | 40.0 | 3355 | 84 % |  | torch.compile: 50.0 | 1.25 |" in text
    assert "| sample (reference) | llama-2-7b, 64 rows | failed |  |  |  | torch eager: 1000.0 |  |" in text


def test_peers_face_ours_without_overlap(written: Callable[..., str]) -> None:
    """Twice as fast where equal launches overlap, which the peer's cannot: the kernel itself gains nothing."""
    contenders = {"fastllama": contender(20e-6), "fastllama, no overlap": contender(40e-6), "eager": contender(50e-6)}
    case = {"op": "rope", "label": "7b", "backend": "triton", "bytes": 0, "flops": 0, "contenders": contenders}
    text = written(ops=[{"case": case}])
    assert "| rope (triton) | 7b | 20.0 | 0 | 0 % | 40.0 | eager: 50.0 | 1.25 |" in text


def test_conditions_and_absences_are_named(written: Callable[..., str]) -> None:
    text = written()
    assert text.startswith("# NVIDIA H200\n")
    assert "liger-kernel 0.8.5, vllm not installed" in text
    assert "reads and writes 4.00 TB/s, a read takes 3.00 TB/s" in text
    assert "800.0 TFLOP/s" in text
    assert "Cases measured: 2, skipped: 1." in text
    assert "| rms_norm | 9.9 | 12.3 |" in text


def test_blocks_are_reported_with_what_failed(written: Callable[..., str]) -> None:
    text = written()
    assert f"| {BLOCK['label']} | fastllama | 100.0 | 92 % | 87 % | 6 |  |" in text
    assert f"| {BLOCK['label']} | torch |  |  |  | 2 | a / b |" in text
    assert "block: cut short" in text
    assert "block: skipped, no time" in written(block=[{"outcome": "skipped", "why": "no time"}])


def test_decode_steps_are_reported_with_what_was_not_measured(written: Callable[..., str]) -> None:
    text = written()
    assert "| fastllama | int4 | 8 | 512 | 1600.00 | 5.00 | - | - | 5.6 | 26 % | 28 % |" in text
    assert "skipped: fastllama, none: a / b" in text
    assert "transformers: not installed" in text
    failed = {**DECODE, "failed": "RuntimeError: no graph"}
    broken = written(decode_at_512=[{"outcome": "failed", "record": {"cases": [failed]}}])
    assert "fastllama, int4, batch 8, context 512: failed: RuntimeError: no graph" in broken
    assert "decode at 512: failed" in broken
    assert "1600.00" not in broken


def test_failures_are_reported(written: Callable[..., str]) -> None:
    text = written()
    assert "| liger-kernel |  |  |  | ImportError: a / b |" in text
    assert "| fastllama |  |  |  | wrong: error 1, bound 0 |" in text
    assert "launches: failed" in written(launches=[{"outcome": "failed"}])


def test_a_cpu_is_reported_by_its_eager_times(written: Callable[..., str]) -> None:
    environment = {"device": "cpu", "gpu": None, "fastllama": "1", "commit": "c", "torch": "2", "triton": "3"}
    text = written(facts=[{"environment": environment, "libraries": {}}])
    assert "| llama-2-7b, 8192 rows | 80.0 | 1678 | 42 % |  | torch.compile: 100.0 | 1.25 |" in text


def test_a_run_that_was_cut_at_once_has_a_report(tmp_path: Path) -> None:
    assert report.markdown(tmp_path) == "# Nothing was measured\n"


@pytest.mark.parametrize(("bytes_", "flops", "seconds"), [(4e12, 8e13, 1.0), (4e11, 8e14, 1.0), (0, 0, 0.0)])
def test_the_floor_is_the_larger_of_two(bytes_: float, flops: float, seconds: float) -> None:
    assert report.floor({"bytes": bytes_, "flops": flops}, CEILINGS) == seconds
