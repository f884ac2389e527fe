"""The programs on docs/use/transformers.md run, and print what the page shows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import fastllama

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs/use/transformers.md").read_text(), re.DOTALL)


def test_the_page_patches() -> None:
    first, second = run("-c", blocks()[0]).splitlines()[:2]
    assert first == "patched 5 of 5 layers"
    assert first in blocks()[0]
    assert second.startswith("Once upon a time")


def test_the_page_runs_a_model_of_transformers_in_our_runtime() -> None:
    printed = run("-c", blocks()[1])
    params = fastllama.SamplingParams(temperature=0, max_tokens=32)
    with fastllama.LLM("tiny", dtype="float32") as llm:
        assert printed == llm.generate("Once upon a time", params)[0].outputs[0].text + "\n"


def test_the_page_rounds_while_loading() -> None:
    assert len(blocks()) == 3
    (kind,) = run("-c", blocks()[2]).splitlines()
    assert kind in blocks()[2]
