"""What every test of a kernel gets: one thread, compiled kernels of the sources here, Triton's kernels checked."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]

# Numba's cache notices a change in a kernel's own file and not in the helpers it inlines from others: a cache for each
# state of all of them. Set before anything imports Numba.
_SOURCES = sorted((ROOT / "fastllama" / "kernels" / "numba").glob("*.py"))
_STATE = hashlib.sha256(b"".join(path.read_bytes() for path in _SOURCES)).hexdigest()[:16]
os.environ["NUMBA_CACHE_DIR"] = str(ROOT / ".pytest_cache" / f"numba-{_STATE}")

torch.set_num_threads(1)  # tensors here are tiny, and the tests may run in several processes


@pytest.fixture(autouse=True)
def checked(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Interpreter tests run repaired, every access checked; `def test_...(checked: Report)` reads their bytes.

    `@pytest.mark.interpreter(order="reverse")`: what `checks` takes.
    """
    marker = request.node.get_closest_marker("interpreter")
    if marker is None:
        yield None
        return
    from fastllama.testing.checks import checks  # loads Triton, which the other tests need not wait for

    with checks(**marker.kwargs) as report:
        yield report
