"""All ops in forked children, Python threads and any number of torch's threads: bit-identical, without a hang.

A child died at its first op of two rows, and without a system libgomp two threads ended the process: Numba's own
parallel regions enter OpenMP, or its workqueue, even for serial work.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")

ROOT = Path(__file__).parents[3]
SECONDS = 240  # of a scenario that compiles everything first, on a busy machine


def run(scenario: str, **variables: str) -> None:
    command = [sys.executable, "-m", "tests.kernels.numba.mixed_calls", scenario]
    given = {name: value for name, value in os.environ.items() if name != "NUMBA_THREADING_LAYER"}
    done = subprocess.run(
        command, env=given | variables, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


has_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
layers = pytest.mark.parametrize("layer", ["default", "workqueue"])


@has_fork
@layers
def test_a_child_runs_what_its_parent_ran(layer: str) -> None:
    run("forked", NUMBA_THREADING_LAYER=layer)


@has_fork
@layers
def test_a_child_runs_what_other_threads_of_its_parent_are_amid(layer: str) -> None:
    run("forked_amid", NUMBA_THREADING_LAYER=layer)


@has_fork
def test_a_child_compiles_where_another_thread_of_its_parent_does(tmp_path: Path) -> None:
    run("forked_amid_compilation", XDG_CACHE_HOME=str(tmp_path))


@layers
def test_threads_that_call_at_once_get_the_bits_they_get_alone(layer: str) -> None:
    run("at_once", NUMBA_THREADING_LAYER=layer)


def test_the_number_of_threads_changes_no_bit() -> None:
    run("counts")
