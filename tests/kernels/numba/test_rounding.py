"""Quantizing and packing in Numba: bit for bit what the reference gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastllama.kernels import reference
from fastllama.kernels.numba import rounding
from tests.kernels.honest import DTYPES, assert_equal

dtypes = pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)


def weight_of(dtype: torch.dtype) -> Tensor:
    """Normal values, and groups of ties, of zeros of both signs, of one value, of huge and of tiny numbers."""
    weight = torch.randn(37, 384, dtype=torch.float64)
    weight[1] = weight[1].sign()  # the first of equal magnitudes decides
    weight[2] = -weight[1]
    weight[3] = 0.0
    weight[4] = -0.0
    weight[5] = 2.5
    weight[6] *= torch.finfo(dtype).max / 16
    weight[7] *= torch.finfo(dtype).smallest_normal
    weight[8] = torch.arange(384) % 31 - 15.5  # halves of steps
    return weight.to(dtype)


def assert_same_bits(found: tuple[Tensor | None, ...], expected: tuple[Tensor | None, ...]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        if ours is None or theirs is None:
            assert ours is theirs
        else:
            assert_equal(ours, theirs)
            if ours.is_floating_point():
                assert_equal(ours.signbit(), theirs.signbit())


@pytest.mark.parametrize("group", [32, 64, 128, 384])
@dtypes
def test_rounding(dtype: torch.dtype, group: int) -> None:
    weight = weight_of(dtype)
    wide = torch.zeros(37, 400, dtype=dtype)
    wide[:, 8:392] = weight
    for each in (weight, wide[:, 8:392], weight.T.contiguous().T):
        for symmetric in (True, False):
            found = rounding.quantize_int4(each, group, symmetric)
            assert_same_bits(found, reference.quantize_int4(each, group, symmetric))
        assert_same_bits(rounding.quantize_int8(each, group), reference.quantize_int8(each, group))


@pytest.mark.parametrize("shape", [(64, 128), (1, 1), (65, 129), (200, 64), (0, 64), (3, 1000)], ids=str)
def test_packing(shape: tuple[int, int]) -> None:
    four = torch.randint(16, (shape[0], shape[1] + 3), dtype=torch.uint8)
    eight = torch.randint(-128, 128, (shape[0], shape[1] + 3), dtype=torch.int8)
    for rows in (slice(None), slice(None, None, 2)):
        codes = four[rows, 1 : shape[1] + 1]
        assert_equal(rounding.pack_int4(codes), reference.pack_int4(codes))
        codes = eight[rows, 1 : shape[1] + 1]
        assert_equal(rounding.pack_int8(codes), reference.pack_int8(codes))
