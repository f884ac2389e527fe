"""fastllama bench: what it prints and writes, and what it says of peers that are not there."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from fastllama.bench import runtime
from tests.cli.conftest import Command
from tests.cli.models import write_model

SMALL = ("--requests", "3", "--tokens", "4", "--rounds", "2", "--loads", "0.5", "2", "--arrivals", "12")


@pytest.mark.slow
def test_the_runtime_beside_transformers(command: Command, model: str, tmp_path: Path) -> None:
    output, picture = tmp_path / "found.json", tmp_path / "found.png"
    files = ("--output", output, "--plot", picture)
    done = command("bench", "runtime", "--model", model, *SMALL, "--peers", "generate", *files)
    assert done.status == 0, done.err
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["benchmark"] == "serving"
    assert found["conditions"]["prompt_tokens"] == [8, 252]  # 256 less the answer's 4
    assert (found["conditions"]["dtype"], found["conditions"]["device"]) == ("float32", "cpu")
    assert list(found["throughput"]) == ["fastllama", "transformers generate"]
    for figures in found["throughput"].values():
        assert (len(figures["seconds"]), figures["different"]) == (2, 0)
        assert 3 / max(figures["seconds"]) <= figures["requests_per_second"] <= 3 / min(figures["seconds"])
        assert f"{figures['requests_per_second']:.2f}  " in done.out
    first, second = found["arrivals"]
    for run in (first, second):
        assert (len(run["first_token_seconds"]), len(run["inter_token_seconds"])) == (12, 36)
    assert second["rate"] == pytest.approx(4 * first["rate"])
    line = r" 12 samples +[\d.]+ +[\d.]+ +- +36 samples +[\d.]+ +[\d.]+ +-$"  # of 12 and of 36 no p99
    assert re.search(r"^50% +[\d.]+ +" + line, done.out, re.MULTILINE)
    assert re.search(r"^200% +[\d.]+ +" + line, done.out, re.MULTILINE)
    assert "throughput: round 2 of 2\nlatency: 12 requests, " in done.err
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_peers_that_cannot_run_are_named(command: Command, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = (*SMALL[:6], "--loads", "--quiet")
    monkeypatch.setitem(sys.modules, "transformers", None)  # Python's own mark of what is not installed
    done = command("bench", "runtime", "--model", model, *alone)
    assert (done.status, done.err) == (0, "")
    for name in ("generate", "generate_batch"):
        assert f"transformers {name}: not installed: pip install 'fastllama[hf]'\n" in done.out
    assert "transformers" not in command("bench", "runtime", "--model", model, *alone, "--peers").out


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(runtime, "measure", None)
    done = command("bench", "runtime", "--plot", tmp_path / "a.png")
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("fastllama: error: --plot needs 'matplotlib', which is not installed: pip install")
    assert done.err.count("\n") == 1


@pytest.mark.slow
def test_codes_are_measured_where_they_are_asked_for(command: Command, tmp_path: Path) -> None:
    folder, output = write_model(tmp_path / "model", tokenizer=False), tmp_path / "found.json"
    rest = (*SMALL[:6], "--loads", "--peers", "--quiet", "--quantize", "int8", "--output", output)
    done = command("bench", "runtime", "--model", folder, *rest)
    assert (done.status, done.err) == (0, "")
    assert "float32, weights in int8 on cpu" in done.out
    assert json.loads(output.read_text(encoding="utf-8"))["conditions"]["quantization"] == "int8"
