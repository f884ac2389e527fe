"""Which cases of a grid the quick round runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Collect = Callable[..., tuple[list[str], int]]
TESTS = Path(__file__).parent
SOURCE = """
import pytest

TRITON = pytest.param("triton", marks=pytest.mark.interpreter)

@pytest.mark.in_turn("heads", "size")
@pytest.mark.parametrize(("size", "order"), [(5, "HND"), (16, "NHD"), (64, "HND")])
@pytest.mark.parametrize("heads", {"one": 1, "four": 4})
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("backend", ["torch", "numba", TRITON])
def test_grid(backend, dtype, heads, size, order):
    pass

@pytest.mark.interpreter
@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_one(size):
    pass
"""


@pytest.fixture
def collect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Collect:
    """Cases that a run in the interpreter collects, and its exit status."""
    (tmp_path / "conftest.py").write_text((TESTS / "conftest.py").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "test_grid.py").write_text(SOURCE)
    for name, value in {"PYTEST_ADDOPTS": "", "PYTHONPATH": str(TESTS.parent), "TRITON_INTERPRET": "1"}.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "--rootdir", str(tmp_path), str(tmp_path)]

    def run(*options: str) -> tuple[list[str], int]:
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        return [line.split("::")[1] for line in done.stdout.splitlines() if "::" in line], done.returncode

    return run


def test_each_value_occurs_and_not_each_combination(collect: Collect) -> None:
    """The other tiers run the whole grid."""
    collected = set(collect("-m", "not exhaustive")[0])
    cheap = {
        f"test_grid[{backend}-{dtype}-{heads}-{pages}]"
        for backend in ("torch", "numba")
        for dtype in ("fp32", "fp16")
        for heads in ("one", "four")
        for pages in ("5-HND", "16-NHD", "64-HND")
    }
    assert collected - cheap == {
        "test_grid[triton-fp32-one-5-HND]",
        "test_grid[triton-fp16-four-16-NHD]",
        "test_grid[triton-fp32-one-64-HND]",
        "test_one[1]",
    }
    assert cheap <= collected


def test_parts_are_everything_once(collect: Collect) -> None:
    """A part may hold no test; a run that is no part must."""
    everything, _ = collect("-m", "exhaustive")
    parts = [collect("-m", "exhaustive", "--shard", f"{part}/2") for part in (1, 2)]
    assert sorted(name for names, _ in parts for name in names) == sorted(everything)
    assert {status for _, status in parts} == {0}
    assert collect("-m", "exhaustive", "--shard", "1/1000") == ([], 0)
    assert collect("-m", "no_such") == ([], 5)


def test_a_name_that_is_no_parameter_is_refused(collect: Collect, tmp_path: Path) -> None:
    (tmp_path / "test_grid.py").write_text(SOURCE.replace('"heads", "size")', '"head")'))
    assert collect()[1] == pytest.ExitCode.INTERNAL_ERROR
