"""What quantizers cost: a row for each in the table of either model, figures that are numbers, and a picture."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from benchmarks import quantizers
from benchmarks.quantizers import CASES, Case
from fastllama.layers.quantization import METHODS, check_method


def test_every_method_is_measured_with_every_scheme_that_it_is_for() -> None:
    for case in CASES:
        check_method(*case)
    assert {case[:2] for case in CASES} == {(scheme, name) for name, schemes in METHODS.items() for scheme in schemes}
    assert len(set(CASES)) == len(CASES)


def test_of_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text, calibration, output, picture = (
        tmp_path / name for name in ("text", "calibration", "found.json", "found.png")
    )
    text.write_text("Once upon a time there was a cat.\n\nThe cat sat in the sun.\n", encoding="utf-8")
    calibration.write_text("Once upon a time there was a dog.\nThe dog ran to the big tree.\n", encoding="utf-8")
    cases = [Case("w8a8", "rtn", -1), Case("w8a8", "smoothquant", -1)]
    monkeypatch.setattr(quantizers, "CASES", cases)
    given = {"text": text, "calibration": calibration, "output": output, "plot": picture}
    monkeypatch.setattr(sys, "argv", ["quantizers", *(word for key in given for word in (f"--{key}", str(given[key])))])
    quantizers.main()

    record = json.loads(output.read_text(encoding="utf-8"))
    counts = {key: record["conditions"][key] for key in ("calibration_documents", "context", "stride")}
    assert counts == {"calibration_documents": 2, "context": 1024, "stride": 512}
    assert {case["reference"]["documents"] for case in record["cases"]} == {2}
    found = {(case["outliers"], case["method"]): case for case in record["cases"]}
    assert [*found] == [(outliers, case.method) for outliers in (False, True) for case in cases]
    assert len({case["reference"]["nll"]["value"] for case in found.values()}) == 1, "one text, one reference"
    kl = {key: case["kl"]["value"] for key, case in found.items()}
    assert min(kl.values()) > 0
    assert kl[True, "rtn"] > 3 * kl[False, "rtn"], "outliers are hard to round"
    assert kl[True, "smoothquant"] < kl[True, "rtn"] / 3, "and no more where they are taken out"

    lines = capsys.readouterr().out.splitlines()
    titles = [line for line in lines if line and not line.startswith("|")]
    assert titles == ["The model as it is:", "The model with planted outliers:"]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert table[0] == ["weights", "method", "dNLL (SE)", "KL (SE)", "top-1, % (SE)", "seconds"]
    rows = [row for row in table if row[0] == "w8a8"]
    for row, case in zip(rows, found.values(), strict=True):
        assert row[:2] == [case["weights"], case["method"]]
        assert row[3] == f"{case['kl']['value']:.3g} ({case['kl']['standard_error']:.2g})"
        assert all(math.isfinite(float(cell.split(" ")[0])) for cell in row[2:])
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_picture_without_a_name_for_one_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["quantizers", "--plot", str(tmp_path / "found.jpg")])
    monkeypatch.setattr(quantizers, "LLM", None)
    with pytest.raises(ValueError, match=r"^plot is '.*found.jpg'; legal: a file that ends in .png or .svg$"):
        quantizers.main()
