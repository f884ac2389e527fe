"""What quantizing takes: operations counted by hand, seconds of every part of a method, projections marked as such."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import pytest

from benchmarks import quantize_cost
from benchmarks.quantize_cost import CHOLESKY, CLIPPING, COLUMNS, FITTING, FORWARD, REST, SCALES, SUMS
from fastllama.bench.ceilings import ceilings
from fastllama.bench.models import shape

DOCUMENTS = [[1, 2, 3, 4, 5, 6, 7, 8]] * 2


def test_operations_of_a_block_by_hand() -> None:
    """A 1.1B's weights: q, k, v 2560 x 2048, o 2048 x 2048, gate and up 11264 x 2048, down 2048 x 5632."""
    config = shape("1.1b", 64)
    weights = 2560 * 2048 + 2048 * 2048 + 11264 * 2048 + 2048 * 5632
    found = quantize_cost.operations_of(config, 3000, "awq+gptq")
    assert found[FORWARD] == 2 * 3000 * weights
    assert found[SUMS] == 2 * 3000 * (3 * 2048**2 + 5632**2)
    assert found[CHOLESKY] == pytest.approx((3 * 2048**3 + 5632**3) / 3)
    assert found[COLUMNS] == (2560 + 2048 + 11264) * 2048**2 + 2048 * 5632**2
    assert found[SCALES] == 20 * 2 * 1024 * weights
    assert quantize_cost.operations_of(config, 3000, "hqq") == {}
    assert [*quantize_cost.operations_of(config, 3000, "smoothquant")] == [FORWARD, SCALES]
    hessians = quantize_cost.hessian_bytes(config)
    assert [*hessians.values()] == [*[4 * 2048**2] * 3, 4 * 5632**2]


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        ("rtn", [REST]),
        ("hqq", [FITTING, REST]),
        ("awq", [FORWARD, SUMS, SCALES, REST]),
        ("gptq", [FORWARD, SUMS, CLIPPING, CHOLESKY, COLUMNS, REST]),
        ("smoothquant+gptq", [FORWARD, SUMS, SCALES, CHOLESKY, COLUMNS, REST]),
    ],
)
def test_every_part_of_a_method_is_timed(method: str, parts: list[str]) -> None:
    found = quantize_cost.measured(shape("tiny", 8), 1, DOCUMENTS, method)
    assert [*found] == parts
    assert min(found.values()) > 0


def test_seconds_are_those_of_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 16.0])
    monkeypatch.setattr(quantize_cost.time, "perf_counter", lambda: next(clock))
    assert sum(quantize_cost.measured(shape("tiny", 8), 3, DOCUMENTS, "rtn").values()) == pytest.approx(2.0)


def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "found.json"
    monkeypatch.setattr(quantize_cost, "ceilings", functools.partial(ceilings, toy=True))
    monkeypatch.setattr(quantize_cost, "alone", lambda function, *given: function(*given))
    sizes = ["--shape", "tiny", "--blocks", "1", "--samples", "2", "--context", "8"]
    monkeypatch.setattr(sys, "argv", ["quantize_cost", *sizes, "--output", str(output)])
    quantize_cost.main()
    record = json.loads(output.read_text(encoding="utf-8"))
    assert record["conditions"]["method"] == "gptq"
    assert max(record["hessian_bytes"].values()) == 4 * 768**2
    block = sum(record["seconds_of_a_block"].values())
    assert record["estimated_seconds_of_all_blocks"] == pytest.approx(5 * block)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Estimated for a block, at ")
    assert f"Estimated from that for all 5 blocks: {5 * block:.0f} s" in lines
    assert lines[-1] == f"Peak memory beyond the model: {record['peak_bytes'] / 2**20:.0f} MB"


@pytest.mark.exhaustive
def test_memory_that_a_process_has_free_does_not_count() -> None:
    """The peak of the widest layer: three Hessians beside the weight in fp32 and the copy that GPTQ corrects."""
    widest, rows = 768, 256
    gone = [bytearray(1 << 20) for _ in range(64)]
    del gone
    found = quantize_cost.alone(quantize_cost.peak, shape("tiny", 8), DOCUMENTS, "gptq")
    assert found > 4 * (3 * widest**2 + 2 * widest * rows)
