"""8-bit weights: the documented layout, the nearest codes, and products as honest as those of the weight itself."""

from __future__ import annotations

import pytest
import torch

from fastllama.kernels import reference
from tests.kernels.honest import DTYPES, assert_equal

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.mark.parametrize("shape", [(64, 128), (130, 300), (1, 1)], ids=str)
def test_the_layout_is_the_documented_one(shape: tuple[int, int]) -> None:
    """Every code is where the formula of kernels/reference/int8.py says, and 0 wherever no code is."""
    codes = torch.randint(-128, 128, shape, dtype=torch.int8)
    packed = reference.pack_int8(codes)
    tall, broad = -(-shape[0] // 64), -(-shape[1] // 128)
    assert packed.shape == (tall, broad, 4, 128, 16)
    assert packed.dtype == torch.int8
    padded = torch.zeros(64 * tall, 128 * broad, dtype=torch.int8)
    padded[: shape[0], : shape[1]] = codes
    n, k, quarter, lane, byte = torch.meshgrid(*map(torch.arange, packed.shape), indexing="ij")
    w, g, q = lane // 32, lane // 4 % 8, lane % 4
    c, r, i = byte // 8, byte // 4 % 2, byte % 4
    assert_equal(packed, padded[64 * n + 16 * w + 8 * r + g, 128 * k + 32 * quarter + 16 * c + 4 * q + i])


@pytest.mark.parametrize("shape", [(64, 128), (1, 1), (65, 129), (200, 64), (0, 64), (3, 1000)], ids=str)
def test_codes_come_back(shape: tuple[int, int]) -> None:
    wide = torch.randint(-128, 128, (shape[0], shape[1] + 3), dtype=torch.int8)
    for codes in (wide[:, : shape[1]], wide[:, : shape[1]].contiguous()):
        assert_equal(reference.unpack_int8(reference.pack_int8(codes), *shape), codes)


@pytest.mark.parametrize("group", [32, 64, 128, 384])
@dtypes
def test_no_code_is_nearer(dtype: torch.dtype, group: int) -> None:
    weight = torch.randn(9, 384).to(dtype)
    codes, scales = reference.quantize_int8(weight, group)
    assert (scales.shape, scales.dtype) == ((9, 384 // group), dtype)
    columns = torch.arange(384) // group
    every = torch.arange(-128.0, 128)[:, None, None] * scales.double()[:, columns]
    misses = (every - weight.double()).abs()
    assert_equal(misses.gather(0, codes.long()[None] + 128)[0], misses.amin(0))
    values = weight.unflatten(1, (-1, group))
    at = values.abs().argmax(2, keepdim=True)  # the largest magnitude is code 127, with its sign
    assert_equal(codes.unflatten(1, (-1, group)).gather(2, at), (127 * values.gather(2, at).sign()).to(torch.int8))


def test_groups_of_one_value() -> None:
    """Zeros stay zeros; others, of either sign, come back but for the scale's rounding."""
    weight = torch.tensor([0.0, 3.0, -3.0]).repeat_interleave(32)[None]
    codes, scales = reference.quantize_int8(weight, 32)
    assert_equal(codes, torch.tensor([0, 127, -127], dtype=torch.int8).repeat_interleave(32)[None])
    torch.testing.assert_close(reference.dequantize_int8(codes, scales), weight, rtol=1e-6, atol=0)
