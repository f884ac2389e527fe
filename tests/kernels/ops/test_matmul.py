"""matmul and embedding against torch's own linear layer and plain indexing."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastllama.kernels import reference
from tests.kernels.honest import DTYPES, assert_equal, assert_honest, backends, double, public

# rows, K, N: one value, odd everything, one row, either side of where the implementations change their ways, nothing
SHAPES = [(1, 1, 1), (1, 63, 5), (3, 65, 7), (8, 128, 33), (9, 128, 33), (32, 48, 10), (33, 48, 10), (0, 16, 4)]
# beyond the block of weight rows that is widened at a time
SHAPES += [(40, 16, 1030)]
biased = pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, biased: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    rows, size, features = shape
    x, weight = torch.randn(rows, size).to(dtype), (torch.randn(features, size) / math.sqrt(size)).to(dtype)
    return x, weight, torch.randn(features).to(dtype) if biased else None


@biased
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[2] < 100], ids=str)
def test_the_reference_is_the_definition(shape: tuple[int, int, int], biased: bool) -> None:
    x, weight, bias = double(*inputs(shape, torch.float32, biased))
    expected = torch.zeros(shape[0], shape[2], dtype=torch.float64)
    for m in range(shape[0]):
        for n in range(shape[2]):
            expected[m, n] = math.fsum((x[m] * weight[n]).tolist()) + (0.0 if bias is None else float(bias[n]))
    torch.testing.assert_close(reference.matmul(x, weight, bias), expected, rtol=1e-12, atol=1e-12)


@biased
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", backends("matmul"))
def test_matmul(backend: str, dtype: torch.dtype, shape: tuple[int, int, int], biased: bool) -> None:
    x, weight, bias = inputs(shape, dtype, biased)
    found = public("matmul", backend)(x, weight, bias)
    assert_honest(found, F.linear(x, weight, bias), reference.matmul(*double(x, weight, bias)))


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", backends("matmul"))
def test_long_sums_are_kept_in_fp32(backend: str, dtype: torch.dtype, rows: int) -> None:
    """4096 equal terms: a 16-bit accumulator stops growing long before the end."""
    x, weight = torch.ones(rows, 4096, dtype=dtype), torch.full((3, 4096), 0.25, dtype=dtype)
    assert_equal(public("matmul", backend)(x, weight), torch.full((rows, 3), 1024.0, dtype=dtype))


@pytest.mark.parametrize("rows", [1, 6, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", backends("matmul"))
def test_strided_inputs_and_outputs(backend: str, dtype: torch.dtype, rows: int) -> None:
    """x and weight are slices of wider buffers full of NaN, out one whose other columns are left alone."""
    x, weight, bias = inputs((rows, 48, 21), dtype, True)
    wide_x, wide_weight = torch.full((rows, 64), math.nan, dtype=dtype), torch.full((21, 64), math.nan, dtype=dtype)
    wide_x[:, 8:56], wide_weight[:, 8:56] = x, weight
    buffer = torch.full((rows, 40), 7.0, dtype=dtype)
    out = buffer[:, 3:24]
    assert public("matmul", backend)(wide_x[:, 8:56], wide_weight[:, 8:56], bias, out=out) is out
    assert_honest(out, F.linear(x, weight, bias), reference.matmul(*double(x, weight, bias)))
    buffer[:, 3:24] = 7.0
    assert (buffer == 7.0).all()


@pytest.mark.parametrize("leading", [(), (2, 3), (1, 1, 4), (2, 0)])
@pytest.mark.parametrize("backend", backends("matmul"))
def test_any_number_of_leading_dimensions(backend: str, leading: tuple[int, ...]) -> None:
    x, weight = torch.randn(*leading, 24), torch.randn(5, 24)
    found = public("matmul", backend)(x, weight)
    torch.testing.assert_close(found, F.linear(x, weight))


@pytest.mark.parametrize("backend", backends("matmul"))
def test_infinity_and_nan_stay_in_their_row(backend: str) -> None:
    x = torch.ones(3, 8)
    x[0, 2], x[1, 3] = math.nan, math.inf
    found = public("matmul", backend)(x, torch.ones(2, 8))
    assert_equal(found, torch.tensor([[math.nan] * 2, [math.inf] * 2, [8.0] * 2]))


@pytest.mark.parametrize("integers", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", backends("embedding"))
def test_embedding(backend: str, dtype: torch.dtype, integers: torch.dtype) -> None:
    """Rows of a slice of a wider table, repeated ids, the first and the last."""
    weight = torch.randn(11, 40).to(dtype)[:, 4:37]
    ids = torch.tensor([0, 10, 3, 3, 0], dtype=integers)
    run = public("embedding", backend)
    expected = torch.stack([weight[i] for i in ids.tolist()])
    assert_equal(run(ids, weight), expected)
    out = torch.empty(5, 50, dtype=dtype)[:, 9:42]
    assert run(ids, weight, out=out) is out
    assert_equal(out, expected)
    assert run(ids[:0], weight).shape == (0, 33)
