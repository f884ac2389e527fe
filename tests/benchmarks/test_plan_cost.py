"""The cost of a plan: tables of the requested sizes, every round timed beside a copy of the indices."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import plan_cost


def test_tables_hold_a_number_for_each_page() -> None:
    """Three sequences of 100 tokens: 128 columns, the next multiple of 64 tokens; 8 in pages of 16."""
    found = [plan_cost.measure(3, 100, page_size, 2) for page_size in (1, 16)]
    assert [each["table_bytes"] for each in found] == [4 * 3 * 128, 4 * 3 * 8]
    assert all(len(seconds) == 2 and min(seconds) > 0 for each in found for seconds in each["seconds"].values())


def test_a_plan_allocates_nothing_beside_its_table() -> None:
    found = plan_cost.measure(3, 2**20, 1, 1)
    assert found["table_bytes"] == 12 * 2**20
    assert found["peak_bytes"] < 4 * 2**20  # of what else the process does


def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "found.json"
    sizes = ["--sequences", "2", "--tokens", "10", "--page-sizes", "1", "4", "--rounds", "3", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["plan_cost", *sizes])
    plan_cost.main()
    found = json.loads(output.read_text(encoding="utf-8"))
    assert [sample["page_size"] for sample in found["samples"]] == [1, 4]
    assert all(len(sample["seconds"]["plan"]) == 3 for sample in found["samples"])
    assert found["conditions"]["tokens"] == "10"
    assert capsys.readouterr().out.count("a plan") == 2
