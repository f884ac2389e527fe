"""Contract: fastllama/env.py alone reads the environment, and docs/reference/env.md is generated from it."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

from fastllama import env

ROOT = Path(__file__).parents[2]
DOORS = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}


def uses_of_the_environment(source: str) -> list[int]:
    """The lines on which `source` touches the process environment through `os`."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        names = {node.attr} if isinstance(node, ast.Attribute) else set()
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            names = {alias.name for alias in node.names}
        if names & DOORS:
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("folder", ["fastllama", "benchmarks", "tools"])
def test_only_env_reads_the_environment(folder: str) -> None:
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths, f"{folder} holds no Python file"
    readers = [
        str(path.relative_to(ROOT)) for path in paths if uses_of_the_environment(path.read_text(encoding="utf-8"))
    ]
    assert readers == (["fastllama/env.py"] if folder == "fastllama" else [])


def test_the_search_sees_every_door() -> None:
    source = "import os\nfrom os import environ\nos.environ['A']\nos.getenv('A')\nos.environ.get('A')\n"
    assert sorted(uses_of_the_environment(source)) == [2, 3, 4, 5]


def test_the_page_is_what_env_writes() -> None:
    assert (ROOT / "docs" / "reference" / "env.md").read_text(encoding="utf-8") == env.markdown(), "run `make docs`"


def test_a_variable_is_set_within_and_restored_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTLLAMA_PDL", raising=False)
    with env.PDL.set_to("0"):
        assert env.PDL.read() == "0"
        with env.PDL.set_to("1"):
            assert env.PDL.read() == "1"
        assert env.PDL.read() == "0"
    assert "FASTLLAMA_PDL" not in os.environ
