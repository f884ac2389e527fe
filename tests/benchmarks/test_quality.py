"""What quantization costs in quality: a row for each case, measured on the given text."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import quality
from fastllama.verify import Estimate


def test_of_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text, output = tmp_path / "text.txt", tmp_path / "found.json"
    text.write_text("Once upon a time there was a cat.\n\nThe cat sat in the sun.\n", encoding="utf-8")
    monkeypatch.setattr(quality, "CASES", (("int8", "auto"), ("int4", "int8")))  # each opens the model again
    monkeypatch.setattr(sys, "argv", ["quality", "--text", str(text), "--output", str(output)])
    quality.main()
    record = json.loads(output.read_text(encoding="utf-8"))
    assert (record["benchmark"], record["conditions"]["context"], record["conditions"]["stride"]) == (
        "quality",
        1024,
        512,
    )
    cases = {(case["weights"], case["kv_cache_dtype"]): case for case in record["cases"]}
    assert tuple(cases) == quality.CASES
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert table[0] == ["weights", "keys and values", "dNLL (SE)", "KL (SE)", "top-1, % (SE)", "perplexity"]
    assert [tuple(row[:2]) for row in table[2:]] == [("none", "auto"), *quality.CASES]
    assert {case["model"]["documents"] for case in cases.values()} == {2}
    assert len({case["reference"]["nll"]["value"] for case in cases.values()}) == 1, "one text, one reference"
    assert table[2][-1] == f"{cases['int8', 'auto']['reference']['perplexity']['value']:.4f}"
    for row in table[3:]:
        case = cases[row[0], row[1]]
        kl, error = case["kl"].values()
        assert row[3] == f"{kl:.3g} ({error:.2g})"
        assert 0 < kl < 0.1, "each case changes something, and little"
    assert cases["int8", "auto"]["kl"]["value"] < cases["int4", "int8"]["kl"]["value"]


def test_one_document_has_no_standard_error() -> None:
    assert quality.shown(Estimate(0.963, None), ".2f", 100) == "96.30 (-)"
