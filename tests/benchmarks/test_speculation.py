"""The benchmark of speculation: steps have the stated number of tokens, and drafts are accepted at the given rate."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import speculation
from tests.runtime.models import ours


@pytest.mark.parametrize("length", speculation.LENGTHS)
@pytest.mark.parametrize("right", [0.0, 1.0])
def test_a_step_has_its_tokens_and_gives_the_right_ones(
    length: int, right: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    with speculation.verifier(ours(), length, right) as llm:
        rows, run = [], llm.engine._runner.run

        def noting(step: object, *before: object) -> object:
            rows.append([chunk.length for chunk in step.chunks])  # type: ignore[attr-defined]
            return run(step, *before)  # type: ignore[arg-type]

        monkeypatch.setattr(llm.engine._runner, "run", noting)
        found = speculation.decode(llm, 6)
        assert not llm.engine.has_work
    assert rows == [[8]] + [[length]] * (speculation.UNCOUNTED + 6)
    assert len(found["seconds"]) == 6
    assert found["tokens"] == 6 * (length if right else 1)


def test_drafts_are_right_with_their_probability() -> None:
    (proposed,) = speculation.Scripted(0.8).propose([None], 1000)  # type: ignore[list-item]
    assert 0.75 < proposed.count(speculation.RIGHT) / 1000 < 0.85


def run(monkeypatch: pytest.MonkeyPatch, output: Path, *given: str) -> list[dict[str, object]]:
    monkeypatch.setattr(sys, "argv", ["speculation", *given, "--rounds", "1", "--output", str(output)])
    speculation.main()
    samples: list[dict[str, object]] = json.loads(output.read_text(encoding="utf-8"))["samples"]
    return samples


def test_answers_with_and_without_drafts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(monkeypatch, tmp_path / "found.json", "--tokens", "24")
    contenders = ["off", "prompt_lookup", "draft tiny"]
    assert [each["name"] for each in found] == contenders * 4
    assert [each["different"] for each in found] == [0] * 12
    assert [each["drafted"] for each in found if each["name"] == "off"] == [0] * 4
    for each in found:
        assert each["tokens_per_second"] == pytest.approx(3 * 23 / each["seconds"][0])  # type: ignore[index]
    out = capsys.readouterr().out
    assert [out.count(word) for word in ("a few words", "stories", "greedy", "sampled")] == [6] * 4


def test_steps_of_several_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--shape", "tiny", "--quantize", "none", "int8", "--steps", "5", "--right", "1")
    found = run(monkeypatch, tmp_path / "found.json", *given)
    assert [(each["quantization"], each["length"], each["tokens_per_step"]) for each in found] == [
        (kind, length, length) for kind in ("none", "int8") for length in (1, 2, 4, 8)
    ]
    assert capsys.readouterr().out.count("int8") == 4
