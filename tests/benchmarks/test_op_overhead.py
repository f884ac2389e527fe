"""The cost of an op call is measured for every op."""

from __future__ import annotations

import pytest

from benchmarks.op_overhead import cases, overheads
from fastllama.kernels.dispatch.op import OPS


def test_every_op_is_measured() -> None:
    assert set(cases()) == set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_a_measurement_is_a_time(op: str) -> None:
    implementation, *_ = overheads(op, rounds=1, calls=2)
    assert implementation > 0
