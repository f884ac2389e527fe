"""The verdict of a GPU run: errors before slow cases, and every stage that was not reached is listed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import goals, results, verdict

CEILINGS = {"copy_bytes_per_second": 3e12, "read_bytes_per_second": 4e12, "bf16_flops_per_second": 8e14}


def decode(kind: str, share: float) -> dict[str, Any]:
    """A stage's line: a case of ours at a share of the bandwidth, whose matmuls take half a millisecond."""
    case = {
        "name": "fastllama",
        "quantization": kind,
        "batch": 1,
        "context": 512,
        "tokens_per_second": 100.0,
        "bytes_per_second": share * 4e12,
        "weight_bytes": 1e9,
        "kv_bytes": 1e8,
        "launches": [
            {"name": "matmul_dense_kernel", "us_per_step": 900.0, "end_to_end_us_per_step": 500.0},
            {"name": "attention_decode_kernel", "us_per_step": 900.0, "end_to_end_us_per_step": 40.0},
            {"name": "attention_combine_kernel", "us_per_step": 900.0, "end_to_end_us_per_step": 10.0},
        ],
    }
    return {"outcome": "passed", "seconds": 60.0, "record": {"cases": [case]}}


def op(name: str, rows: int, ours: float, **peers: float) -> dict[str, Any]:
    """An op's line. Times in microseconds."""
    times = {"fastllama": ours} | {peer.replace("_", " "): us for peer, us in peers.items()}
    contenders = {who: {"graph": {"median": 1e-6 * us}} for who, us in times.items()}
    shape = {"op": name, "model": "llama-2-7b", "rows": rows, "context": 4096, "codes": None, "bytes": 3e7}
    return {"case": {**shape, "contenders": contenders}}


def written(folder: Path, **stages: list[dict[str, Any]]) -> Path:
    (folder / results.FILE).unlink(missing_ok=True)
    for stage, lines in stages.items():
        for line in lines:
            results.append(folder / results.FILE, **{"stage": stage.replace("_", " ")} | line)
    return folder


def test_a_run_that_reached_nothing_reports_it(tmp_path: Path) -> None:
    text = verdict.markdown(tmp_path)
    assert "Ops: not reached." in text
    assert "Tokens: not reached." in text
    assert all(goal.name in text for goal in goals.GOALS)


def test_goals_are_sorted_by_what_is_missing(tmp_path: Path) -> None:
    ops = [
        op("rms_norm", 8192, 11.0),  # 91 % of a copy
        op("matmul_int4", 1, 10.0, **{"F.linear, unquantized": 20.0}),
        op("matmul_int4", 16, 10.0, **{"F.linear, unquantized": 30.0}),
    ]
    folder = written(tmp_path, ceilings=[CEILINGS], decode_at_512=[decode("none", 0.8), decode("int4", 0.3)], ops=ops)
    found = results.read(folder)
    reached = {goal.name: goal.measure(found) for goal in goals.GOALS}
    assert reached["7B decode, batch 1, bf16: of the bandwidth"] == pytest.approx(0.8)
    assert reached["7B decode, batch 1, int4: of the bandwidth"] == pytest.approx(0.3)
    assert reached["7B decode, batch 1, int8: of the bandwidth"] is None
    assert reached["4-bit matmul, 1 to 16 rows: times bf16"] == pytest.approx(2.0)  # the worst
    assert reached["rms_norm, 8192 rows: of a copy"] == pytest.approx(3e7 / 11e-6 / 3e12)
    text = verdict.markdown(folder)
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.endswith((" % |", "reached |"))]
    assert rows[-4:] == [
        "| 7B decode, batch 1, int4: of the bandwidth",
        "| 4-bit matmul, 1 to 16 rows: times bf16",
        "| 7B decode, batch 1, bf16: of the bandwidth",
        "| rms_norm, 8192 rows: of a copy",
    ]
    assert "The largest gap is 54 %, 7B decode, batch 1, int4" in text


def test_an_op_is_measured_without_overlap(tmp_path: Path) -> None:
    """The time without overlap counts where it was measured: overlapping launches look faster than one kernel."""
    times = {"fastllama, no overlap": 20.0, "F.linear, unquantized": 50.0}
    found = results.read(written(tmp_path, ceilings=[CEILINGS], ops=[op("matmul_int4", 1, 10.0, **times)]))
    goal = next(goal for goal in goals.GOALS if goal.name.startswith("4-bit matmul"))
    assert goal.measure(found) == pytest.approx(2.5)


def test_a_steps_kernels_have_their_own_share(tmp_path: Path) -> None:
    text = verdict.markdown(written(tmp_path, ceilings=[CEILINGS], decode_at_512=[decode("int4", 0.3)]))
    # 1 GB in 500 us are 2 TB/s, 0.1 GB in 50 us too
    assert "| int4, batch 1, context 512 | 100.0 | 30 % | 50 % | 50 % |" in text


def test_wrong_ops_are_first(tmp_path: Path) -> None:
    common = {"dtype": "bfloat16", "label": "7b"}
    parity = [
        {"op": "rope", "right": True, "error": 1e-3, "bound": 2e-3, **common},
        {"op": "matmul", "right": False, "error": 1.0, "bound": 2e-3, **common},
        {"op": "sample", "right": False, "failed": "RuntimeError: x", **common},
    ]
    tokens = [{"mode": "as it is", "right": False, "equal": 0, "answers": 16, "ties": 0, "differences": []}]
    folder = written(tmp_path, parity=[*parity, {"outcome": "failed", "seconds": 1}], tokens=tokens)
    text = verdict.markdown(folder)
    assert "Ops: 1 of 3 cases right." in text
    assert "WRONG matmul, bfloat16, 7b: error 1, bound 0.002" in text
    assert "WRONG sample, bfloat16, 7b: RuntimeError: x" in text
    said = verdict.advice(results.read(folder))
    assert said[0].startswith("Repair matmul, sample")
    assert said[1] == "Read in log.txt why these failed: parity."


@pytest.mark.parametrize(
    ("right", "said"),
    [
        ({"as it is": False, "no graphs": True, "no steps ahead": False}, "not with no graphs: that is where to look"),
        ({"as it is": False, "no graphs": False}, "differ in every mode"),
        ({"as it is": True, "no graphs": True}, "Nothing failed and nothing differs; of 12 goals 0"),
    ],
)
def test_the_mode_that_differs_names_the_culprit(right: dict[str, bool], said: str, tmp_path: Path) -> None:
    counts = {"equal": 9, "answers": 16, "ties": 0, "differences": [{"token": 3}]}
    folder = written(tmp_path, tokens=[{"mode": mode, "right": each, **counts} for mode, each in right.items()])
    assert said in verdict.advice(results.read(folder))[0]
    assert ("first: {'token': 3}" in verdict.markdown(folder)) == (False in right.values())


def test_what_was_not_finished_can_be_run_again(tmp_path: Path) -> None:
    folder = written(
        tmp_path, block=[{"outcome": "cut short", "seconds": 75}], ops=[{"outcome": "skipped", "why": "x"}]
    )
    assert verdict.advice(results.read(folder)) == ["Run again for what was not finished: --stages 'block' 'ops'."]
    assert "| ops | skipped |  | x |" in verdict.markdown(folder)
