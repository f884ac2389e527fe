"""Illegal ids, positions, slots, lengths, pages and bounds give the reference's results on the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastllama import kernels
from fastllama.catalogue.arguments import results
from tests.kernels.garbage import INDEXED, garbage_calls
from tests.kernels.honest import public

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)


@pytest.mark.parametrize("op", INDEXED)
def test_illegal_indices_give_what_the_reference_gives(op: str) -> None:
    """Results and pages are compared; an illegal access would end the process, or change one of these."""
    for call in garbage_calls(op):
        there = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in call.items()}
        expected, found = public(op, "reference")(**call), getattr(kernels, op)(**there)
        pairs = [*zip(results(op, call, expected), results(op, there, found), strict=True)]
        pairs += [(call[name], value) for name, value in there.items() if isinstance(value, Tensor)]
        for right, result in pairs:
            torch.testing.assert_close(result.cpu(), right, rtol=1e-3, atol=1e-4, equal_nan=True)
