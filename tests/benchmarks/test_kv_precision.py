"""What keys and values in 8 bits cost: little, and what is measured is the text that was given."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import kv_precision


def test_of_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text, output = tmp_path / "text.txt", tmp_path / "found.json"
    text.write_text("Once upon a time there was a cat.\nThe cat sat in the sun.\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["kv_precision", "--text", str(text), "--output", str(output)])
    kv_precision.main()
    cases = {case["kv_cache_dtype"]: case for case in json.loads(output.read_text(encoding="utf-8"))["cases"]}
    assert list(cases) == ["auto", "int8", "fp8"] == [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert len({case["tokens"] for case in cases.values()}) == 1
    full = cases["auto"]["perplexity"]
    assert full > 1
    for kind in ("int8", "fp8"):
        assert 0 < abs(cases[kind]["perplexity"] / full - 1) < 0.1
