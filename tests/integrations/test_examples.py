"""What docs and examples show of fastllama.patch runs, and prints what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_of_the_documentation() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/use/transformers.md").read_text(), re.DOTALL)
    first, second = run("-c", code).splitlines()[:2]
    assert first == "patched 5 of 5 layers"
    assert first in code
    assert second.startswith("Once upon a time")


def test_the_example() -> None:
    printed = run("examples/patch_transformers.py", "--tokens", "24")
    assert "patched 5 of 5 layers\n" in printed
    assert re.search(r"patched: \d+\.\d tokens/s, the same text", printed)
