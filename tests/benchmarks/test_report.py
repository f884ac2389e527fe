"""The report: figures, floors and failures as they stand in the record."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import report

CEILINGS = {"copy_bytes_per_second": 4e12, "bf16_flops_per_second": 8e14}
BLOCK = {
    "label": "llama-2-7b, none, 1 rows, 512 tokens of context",
    "contenders": {
        "fastllama": {"launches": 6 * ["matmul_kernel"], "graph": {"median": 1e-4, "of_copy": 0.87}},
        "torch": {"launches": ["mm", "silu"], "graph": {"failed": "a | b"}, "eager": {"median": 1e-3, "of_copy": 0.1}},
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
    "of_copy": 0.283,
}


def contender(seconds: float) -> dict[str, Any]:
    return {"error": 1e-3, "graph": {"median": seconds}, "eager": {"median": 2 * seconds}}


def record(**changes: Any) -> dict[str, Any]:
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
    return {
        "environment": {
            "device": "NVIDIA H200",
            "gpu": {},
            "fastllama": "1",
            "commit": "c",
            "torch": "2",
            "triton": "3",
        }
        | {"gpu": {"name": "NVIDIA H200"}},
        "libraries": {"liger-kernel": "0.8.5", "vllm": None},
        "conditions": {"dtype": "bfloat16"},
        "tests": {"outcome": "passed", "status": 0},
        "launch_overhead": {
            "ops": {"rms_norm": {"outputs given": {"median": 9.87}, "allocated": {"median": 12.34}}},
        },
        "block": {"cases": [BLOCK], "cut_short": "cut short after 96 s"},
        "decode": {
            "cases": [DECODE],
            "skipped": ["fastllama, none: a | b"],
            "absent": {"transformers": "not installed"},
        },
        "ceilings": CEILINGS,
        "cases": cases,
        "skipped": ["x"],
    } | changes


def test_ours_stands_beside_the_fastest_peer() -> None:
    text = report.markdown(record())
    # 134 MB at 4 TB/s take 33.6 us: 84 % of 40 us; torch.compile takes 1.25 times as long
    assert "| rms_norm (triton) | llama-2-7b, 8192 rows | 40.0 | 3355 | 84 % | torch.compile: 50.0 | 1.25 |" in text
    assert "| sample (reference) | llama-2-7b, 64 rows | failed |  |  | torch eager: 1000.0 |  |" in text


def test_conditions_and_absences_are_named() -> None:
    text = report.markdown(record())
    assert text.startswith("# NVIDIA H200, bfloat16\n")
    assert "liger-kernel 0.8.5, vllm not installed" in text
    assert "4.00 TB/s" in text
    assert "800.0 TFLOP/s" in text
    assert "Tests: passed. Cases measured: 2, skipped: 1." in text
    assert "| rms_norm | 9.9 | 12.3 |" in text


def test_blocks_are_told_with_what_failed() -> None:
    text = report.markdown(record())
    assert f"| {BLOCK['label']} | fastllama | 100.0 | 87 % | 6 |  |" in text
    assert f"| {BLOCK['label']} | torch |  |  | 2 | a / b |" in text
    assert "cut short after 96 s" in text
    assert "status 2" in report.markdown(record(block={"cases": [], "failed": "status 2"}))


def test_decode_steps_are_told_with_what_was_not_measured() -> None:
    text = report.markdown(record())
    assert "| fastllama | int4 | 8 | 512 | 1600.00 | 5.00 | - | - | 5.6 | 28 % |" in text
    assert "skipped: fastllama, none: a / b" in text
    assert "transformers: not installed" in text
    failed = {**DECODE, "failed": "RuntimeError: no graph"}
    broken = report.markdown(record(decode={"cases": [failed], "failed": "status 1, see decode.txt"}))
    assert "fastllama, int4, batch 8, context 512: failed: RuntimeError: no graph" in broken
    assert "status 1, see decode.txt" in broken
    assert "1600.00" not in broken
    assert "for lack of tqdm" in report.markdown(record(decode={"cases": [], "not_run": "for lack of tqdm"}))


def test_failures_are_told() -> None:
    text = report.markdown(record())
    assert "| liger-kernel |  |  |  | ImportError: a / b |" in text
    assert "| fastllama |  |  |  | wrong: error 1, bound 0 |" in text
    failed = report.markdown(record(launch_overhead={"ops": {}, "failed": "status 1, see launch_overhead.txt"}))
    assert "status 1, see launch_overhead.txt" in failed


def test_a_cpu_is_reported_by_its_eager_times() -> None:
    found = record()
    found["environment"]["gpu"] = None
    assert "| llama-2-7b, 8192 rows | 80.0 | 1678 | 42 % | torch.compile: 100.0 | 1.25 |" in report.markdown(found)


@pytest.mark.parametrize(("bytes_", "flops", "seconds"), [(4e12, 8e13, 1.0), (4e11, 8e14, 1.0), (0, 0, 0.0)])
def test_the_floor_is_the_larger_of_two(bytes_: float, flops: float, seconds: float) -> None:
    assert report.floor({"bytes": bytes_, "flops": flops}, CEILINGS) == seconds
