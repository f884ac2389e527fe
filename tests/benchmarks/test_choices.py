"""The tokens that scoring choices computes: all of them, or each context once except for its last page."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import choices


def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "found.json"
    sizes = ["--questions", "3", "--context", "50", "--page-size", "16", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["choices", *sizes])
    choices.main()
    cases = json.loads(output.read_text(encoding="utf-8"))["cases"]
    for name, shared, reused, lost in (("own contexts", 0, 0, 0), ("half shared", 25, 2 * 16, 2 * (25 - 16))):
        asked = choices.questions(2048, 3, 50, shared=shared)
        lengths = [len(context) + len(choice) for context, each in asked for choice in each]
        by_logprobs, by_score = (case for case in cases if case["questions"] == name)
        assert by_logprobs["tokens"] == sum(lengths)
        fed = sum(lengths) - len(lengths)
        assert by_score["tokens"] == fed - 3 * 3 * 48 - reused, "three choices of each question reuse its full pages"
        assert by_score["least"] == by_score["tokens"] - 3 * 3 * 2 - lost, "what lies in pages that are not full"
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == [
        "questions",
        *["own contexts"] * 2,
        *["half shared"] * 2,
    ]
