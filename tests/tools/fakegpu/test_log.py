"""The fake GPU's log is read and counted; violations are grouped by their text."""

from __future__ import annotations

from pathlib import Path

from tools.fakegpu import log

LINES = """load matmul_kernel registers 64 stack 0
compile ('module', 'matmul_kernel', {})
launch matmul_kernel grid 1 1 1 threads 128 shared 0 overlaps 1 captured 1
launch matmul_kernel grid 1 1 1 threads 128 shared 0 overlaps 1 captured 1
capture ends kernels 2 overlapping 2 copies 0 sets 0 others 0
graph nodes 2
VIOLATION cudaMalloc while a stream is captured
copy 8 pinned device
"""


def test_processes_are_counted_together(tmp_path: Path) -> None:
    for process in (7, 8):
        (tmp_path / f"log.{process}").write_text(LINES)
    found = log.read(tmp_path / "log")
    assert found.violations == {"cudaMalloc while a stream is captured": 2}
    assert found.launches == {"matmul_kernel": 4}
    assert found.loads == {"matmul_kernel": 2}
    assert str(found) == "1 kernels of ours, 4 launches, 2 captures of 4 kernels, of which 4 overlap, 2 replays"


def test_nothing_is_no_violation(tmp_path: Path) -> None:
    assert str(log.read(tmp_path / "log")).startswith("0 kernels of ours, 0 launches, 0 captures")
