"""Fixtures of every kernel test: one thread, and Triton's kernels checked in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

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
