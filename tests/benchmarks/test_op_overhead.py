"""The cost of an op call is measured for every op."""

from __future__ import annotations

import pytest

from benchmarks.op_overhead import overheads
from fastllama.kernels.dispatch.op import OPS


@pytest.mark.parametrize("op", OPS)
def test_a_measurement_is_a_time(op: str) -> None:
    implementation, *_ = overheads(op, rounds=1, calls=2)
    assert implementation > 0
