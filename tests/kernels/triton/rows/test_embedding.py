"""The Triton embedding: ids outside the table, and rows of several programs."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.honest import assert_equal, public

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("integers", [torch.int32, torch.int64], ids=str)
def test_an_id_outside_the_table_gives_nan_and_reads_nothing(integers: torch.dtype) -> None:
    """The harness refuses every access outside a tensor."""
    weight = torch.randn(11, 40)
    ids = torch.tensor([3, -1, 11, 1 << 30, 0], dtype=integers)
    out = public("embedding", "triton")(ids, weight)
    assert_equal(out[[0, 4]], weight[[3, 0]])
    assert out[1:4].isnan().all()


def test_rows_of_several_programs() -> None:
    weight = torch.randn(3, 2500).bfloat16()
    assert_equal(public("embedding", "triton")(torch.tensor([2, 0]), weight), weight[[2, 0]])
