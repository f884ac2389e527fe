"""rms_norm and add_rms_norm against Hugging Face's LlamaRMSNorm."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fastllama.kernels import reference
from tests.kernels.honest import DTYPES, assert_equal, assert_honest, backends, double, public

EPS = 1e-5
# one value, odd, above one vector, a power of two, Llama 2 13B's
SHAPES = [(1, 1), (3, 63), (2, 5, 100), (1, 4096), (2, 5120), (0, 64), (4, 0, 64), (7,)]


def hugging_face(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    norm = LlamaRMSNorm(weight.shape[0], eps)
    norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    return norm(x).to(x.dtype)


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_is_the_formula(shape: tuple[int, ...]) -> None:
    x, residual, weight = double(*inputs(shape, torch.float32))
    expected = x / ((x**2).sum(-1, keepdim=True) / shape[-1] + EPS) ** 0.5 * weight
    torch.testing.assert_close(reference.rms_norm(x, weight, EPS), expected, rtol=1e-14, atol=1e-14)
    normed, total = reference.add_rms_norm(x, residual, weight, EPS)
    assert_equal(total, x + residual)
    assert_equal(normed, reference.rms_norm(x + residual, weight, EPS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_rounds_where_hugging_face_does(dtype: torch.dtype) -> None:
    x, _, weight = inputs((5, 128), dtype)
    assert_equal(reference.rms_norm(x, weight, EPS), hugging_face(x, weight))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", backends("rms_norm"))
def test_rms_norm(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, _, weight = inputs(shape, dtype)
    exact = reference.rms_norm(*double(x, weight), EPS)
    assert_honest(public("rms_norm", backend)(x, weight, EPS), hugging_face(x, weight), exact)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", backends("add_rms_norm"))
def test_add_rms_norm(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, residual, weight = inputs(shape, dtype)
    normed, total = public("add_rms_norm", backend)(x, residual, weight, EPS)
    assert_equal(total, x + residual)
    # the sum is rounded before it is normalised, so that is what the oracle gets
    assert_honest(normed, hugging_face(total, weight), reference.rms_norm(*double(total, weight), EPS))


@pytest.mark.parametrize("backend", backends("rms_norm"))
def test_eps_keeps_a_row_of_zeros_zero_and_counts_in_small_rows(backend: str) -> None:
    x = torch.stack([torch.zeros(8), torch.full((8,), 1e-3)])
    normed = public("rms_norm", backend)(x, torch.ones(8), 1e-6)
    torch.testing.assert_close(normed, torch.tensor([[0.0], [0.5**0.5]]).expand(2, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", backends("rms_norm"))
def test_the_weight_may_be_fp32(backend: str, dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 100).to(dtype), torch.randn(100)
    exact = reference.rms_norm(*double(x, weight), EPS)
    assert_honest(public("rms_norm", backend)(x, weight, EPS), hugging_face(x, weight), exact)


@pytest.mark.parametrize("backend", backends("rms_norm"))
def test_large_values_do_not_overflow(backend: str) -> None:
    """The squares of fp16 values leave fp16's range; in fp32 they do not."""
    x = torch.full((2, 64), 6e4, dtype=torch.float16)
    assert_equal(public("rms_norm", backend)(x, torch.ones(64, dtype=x.dtype), EPS), torch.ones_like(x))


@pytest.mark.parametrize("backend", backends("rms_norm"))
def test_nan_stays_in_its_row(backend: str) -> None:
    x = torch.randn(3, 16)
    x[1, 3] = torch.nan
    assert public("rms_norm", backend)(x, torch.ones(16), EPS).isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm"])
@pytest.mark.parametrize("backend", backends("rms_norm"))
def test_the_normalised_value_is_rounded_before_the_weight(backend: str, op: str, dtype: torch.dtype) -> None:
    """The mean of 1, 49, 1, 49... is 25, so the scale is 1/5 up to fp32's last bit, which no rounding here can see."""
    x, weight = torch.tensor([1.0, 7.0, -1.0, -7.0] * 16, dtype=dtype), torch.randn(64).to(dtype)
    expected = (x.double() / 5).to(dtype) * weight
    assert (expected != (x.double() / 5 * weight).to(dtype)).any()
    if op == "rms_norm":
        assert_equal(public(op, backend)(x, weight, 0.0), expected)
    else:
        assert_equal(public(op, backend)(x - 2, torch.full_like(x, 2), weight, 0.0)[0], expected)


@pytest.mark.parametrize("backend", backends("add_rms_norm"))
def test_strided_rows_and_outputs(backend: str) -> None:
    """Slices of wider buffers are read and written in place, and their neighbours are not written."""
    x, residual, weight = inputs((6, 48), torch.bfloat16)
    wide = [torch.full((6, width), 7.0, dtype=x.dtype) for width in (60, 70, 80, 100)]
    for buffer, values in zip(wide, (x, residual), strict=False):
        buffer[:, 8:56] = values
    views = [buffer[:, 8:56] for buffer in wide]
    expected = public("add_rms_norm", backend)(x, residual, weight, EPS)
    found = public("add_rms_norm", backend)(*views[:2], weight, EPS, out=views[2], residual_out=views[3])
    for view, result, value in zip(views[2:], found, expected, strict=True):
        assert result is view
        assert_equal(view, value)
    for buffer in wide[2:]:
        buffer[:, 8:56] = 7.0
        assert (buffer == 7.0).all()


@pytest.mark.parametrize("backend", backends("add_rms_norm"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(backend: str, dtype: torch.dtype) -> None:
    """The form the layers use: the norm lands in x, the sum in the residual."""
    x, residual, weight = inputs((5, 96), dtype)
    normed, total = public("add_rms_norm", backend)(x, residual, weight, EPS)
    alone = public("rms_norm", backend)(x, weight, EPS)
    y, r = x.clone(), residual.clone()
    public("add_rms_norm", backend)(y, r, weight, EPS, out=y, residual_out=r)
    assert_equal(y, normed)
    assert_equal(r, total)
    public("rms_norm", backend)(x, weight, EPS, out=x)
    assert_equal(x, alone)


@pytest.mark.parametrize("backend", backends("rms_norm"))
def test_a_row_does_not_depend_on_the_others(backend: str) -> None:
    x, _, weight = inputs((9, 300), torch.bfloat16)
    together = public("rms_norm", backend)(x, weight, EPS)
    assert_equal(together[4:5], public("rms_norm", backend)(x[4:5], weight, EPS))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("backend", backends("rms_norm"))
def test_the_weight_multiplies_what_is_normalised(backend: str, rows: int) -> None:
    """Not x, which times the weight overflows: 3e19 * 3e19, or 0 * inf where the mean square does."""
    x, weight = torch.full((rows, 9), 3.0e18), torch.full((9,), 3.0e30)
    assert_honest(
        public("rms_norm", backend)(x, weight, EPS), hugging_face(x, weight), double(weight)[0].expand(rows, 9)
    )
    x, weight = torch.full((rows, 9), -3.0e38), torch.full((9,), 2.0)
    assert_equal(public("rms_norm", backend)(x, weight, EPS), hugging_face(x, weight))


@pytest.mark.parametrize("backend", backends("rms_norm"))
@pytest.mark.parametrize("eps", [0, 0.0, 1e-45, 1e30, math.inf, math.nan, -1.0])
def test_any_eps_and_a_row_of_zeros(backend: str, eps: float) -> None:
    x = torch.tensor([[0.0, -0.0, 0.0], [1.0, -2.0, 3.0], [1e-30, -1e-30, 1e-30]])
    found, expected = public("rms_norm", backend)(x, torch.ones(3), eps), hugging_face(x, torch.ones(3), eps)
    torch.testing.assert_close(found, expected, equal_nan=True)
