"""Throughput and latency: all contenders give the same answers, and every request and token is timed."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

from benchmarks import serving


def test_prompts_are_of_all_lengths() -> None:
    lengths = [len(prompt) for prompt in serving.prompts_of(500, 97, random.Random(0))]
    assert (min(lengths), max(lengths)) == (8, 399)
    assert 50 < sorted(lengths)[250] < 65  # the middle of their logarithms: 57


def test_percentiles() -> None:
    assert serving.percentiles([float(i) for i in range(101)]) == pytest.approx([50, 90, 99])


@pytest.mark.slow
def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    output, picture = tmp_path / "found.json", tmp_path / "found.png"
    sizes = ["--requests", "3", "--tokens", "4", "--rounds", "2", "--peers", "generate", "--loads", "0.5", "2"]
    monkeypatch.setattr(sys, "argv", ["serving", *sizes, "--output", str(output), "--plot", str(picture)])
    serving.main()
    found = json.loads(output.read_text(encoding="utf-8"))
    assert list(found["throughput"]) == ["fastllama", "transformers generate"]
    for figures in found["throughput"].values():
        assert (len(figures["seconds"]), figures["different"]) == (2, 0)
    first, second = found["arrivals"]
    for run in (first, second):
        assert len(run["first_token_seconds"]) == 6
        assert len(run["inter_token_seconds"]) == 6 * 3
        assert min(run["first_token_seconds"]) > 0
    assert second["rate"] == pytest.approx(4 * first["rate"])
    assert capsys.readouterr().out.count("requests/s") == 2 + 4
    assert picture.read_bytes().startswith(b"\x89PNG")
