"""A record of ops as text: shares of the nearer ceiling, peers beside ours, and what failed."""

from __future__ import annotations

from typing import Any

import pytest

from fastllama.bench.ops.report import ALONE, OURS, floor, line, report

CEILINGS = {"copy_bytes_per_second": 2e12, "read_bytes_per_second": 4e12, "bf16_flops_per_second": 8e14, "seconds": {}}


def contender(**medians: float) -> dict[str, Any]:
    return {"error": 1e-3, "bound": 2e-3, **{way: {"median": seconds} for way, seconds in medians.items()}}


def case(**contenders: Any) -> dict[str, Any]:
    names = {"ours": OURS, "alone": ALONE, "eager": "torch eager", "compiled": "torch.compile", "own": "F.rms_norm"}
    return {
        "op": "rms_norm",
        "label": "llama-2-7b, 8192 rows",
        "backend": "triton",
        "bytes": 4_000_000,
        "flops": 0,
        "contenders": {names[name]: each for name, each in contenders.items()},
    }


def record(*cases: dict[str, Any]) -> dict[str, Any]:
    return {
        "environment": {"device": "a GPU"},
        "conditions": {"dtype": "bfloat16"},
        "ceilings": CEILINGS,
        "cases": list(cases),
        "skipped": ["rope, toy, 3 rows: no time left"],
    }


@pytest.mark.parametrize(("flops", "expected"), [(0, 1e-6), (8e8, 1e-6), (8e9, 1e-5)])
def test_the_floor_is_the_larger_of_two_times(flops: float, expected: float) -> None:
    assert floor(case() | {"flops": flops}, CEILINGS) == pytest.approx(expected)


def test_a_row_has_our_time_its_share_and_each_peer() -> None:
    found = case(
        ours=contender(graph=2e-6, eager=9e-6),
        alone=contender(graph=1e-6),
        eager=contender(graph=4e-5, eager=4e-4),
        compiled=contender(graph=5e-6),
        own=contender(graph=3e-6),
    )
    text = report(record(found))
    (row,) = (line for line in text.splitlines() if line.startswith("rms_norm (triton)"))
    cells = [cell.strip() for cell in row.split("  ") if cell.strip()]
    assert cells == [
        "rms_norm (triton)",
        "llama-2-7b, 8192 rows",
        "2.0",
        "50 %",
        "40.0",
        "5.0",
        "F.rms_norm: 3.0",
        "1.0e-03",
        "2.0e-03",
    ]
    assert line(found) == "rms_norm, llama-2-7b, 8192 rows: 2.0 us; F.rms_norm 3.0 us"
    assert "a copy moves 2000.0 GB/s, a read 4000.0, a matmul 800 TFLOP/s" in text


def test_ours_without_a_graph_is_beside_peers_without_one() -> None:
    found = case(ours=contender(eager=9e-6), own=contender(graph=3e-6, eager=8e-6))
    assert line(found) == "rms_norm, llama-2-7b, 8192 rows: 9.0 us; F.rms_norm 8.0 us"


def test_failures_are_named() -> None:
    wrong = {"error": 1.0, "bound": 0.1, "failed": "wrong: error 1, bound 0.1"}
    text = report(record(case(ours=wrong, eager=contender(eager=1e-6))))
    assert "rms_norm, llama-2-7b, 8192 rows: fastllama failed: wrong: error 1, bound 0.1" in text
    assert "skipped: rope, toy, 3 rows: no time left" in text
    assert "rms_norm (triton)" not in text
    assert line(case(ours=wrong)) == "rms_norm, llama-2-7b, 8192 rows: failed: wrong: error 1, bound 0.1"
