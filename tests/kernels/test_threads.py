"""The kernels use the threads that torch was told to use, and leave torch's setting alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_numba_does_not_change_the_number_of_torchs_threads() -> None:
    """Starting its own threads sets OpenMP's number for the process; a process of its own, as that happens once."""
    pytest.importorskip("numba")
    code = """
import torch
torch.set_num_threads(1)
from fastllama import kernels
x = torch.ones(4, 8)
kernels.rms_norm(x, torch.ones(8))
import numba
print(torch.get_num_threads(), numba.get_num_threads())
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert found == "1 1\n"
