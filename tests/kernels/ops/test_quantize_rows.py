"""rms_norm_int8, add_rms_norm_int8 and silu_mul_int8 are the plain op and quantize_rows, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastllama import kernels
from fastllama.testing.poison import noise_
from tests.kernels.honest import DTYPES, assert_equal, backends, public

EPS = 1e-5
SHAPES = [(1, 2), (3, 126), (2, 5, 100), (1, 5120), (7, 64), (0, 64), (2, 0, 64), (10,)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert_equal(ours, theirs)


def separate(backend: str, op: str, *given: Tensor | float) -> tuple[Tensor, Tensor]:
    """On one backend, the op and quantize_rows one after the other."""
    results = public(op, backend)(*given)
    rounded: tuple[Tensor, Tensor] = kernels.quantize_rows(results[0] if isinstance(results, tuple) else results)
    return rounded


@shapes
@dtypes
@pytest.mark.parametrize("backend", backends("rms_norm_int8"))
def test_rms_norm_int8(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    for each in (weight, weight.float()):
        same(public("rms_norm_int8", backend)(x, each, EPS), separate(backend, "rms_norm", x, each, EPS))


@shapes
@dtypes
@pytest.mark.parametrize("backend", backends("add_rms_norm_int8"))
def test_add_rms_norm_int8(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    weight, total = torch.randn(shape[-1]).to(dtype), x + residual
    expected = separate(backend, "add_rms_norm", x, residual, weight, EPS)
    same(public("add_rms_norm_int8", backend)(x, residual, weight, EPS), expected)
    assert_equal(residual, total)


@shapes
@dtypes
@pytest.mark.parametrize("backend", backends("silu_mul_int8"))
def test_silu_mul_int8(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    gate_up = (4 * torch.randn(shape)).to(dtype)
    same(public("silu_mul_int8", backend)(gate_up), separate(backend, "silu_mul", gate_up))


@pytest.mark.parametrize("backend", backends("rms_norm_int8"))
def test_rows_of_wider_buffers(backend: str) -> None:
    """Slices: memory beside them is neither read nor written, and given outputs are returned."""
    wide, total = noise_(torch.empty(6, 100).bfloat16()), noise_(torch.empty(6, 90).bfloat16())
    wide[1:-1, 8:78], total[1:-1, 8:78] = torch.randn(4, 70).bfloat16(), torch.randn(4, 70).bfloat16()
    weight, before = torch.randn(70).bfloat16(), total.clone()
    x, residual = wide[1:-1, 8:78], total[1:-1, 8:78]
    out, scales = torch.empty(4, 70, dtype=torch.int8), torch.empty(4)
    given = {"out": out, "scales_out": scales}
    for op, args in (
        ("rms_norm_int8", (x, weight, EPS)),
        ("silu_mul_int8", (wide[1:-1, 8:78],)),
        ("add_rms_norm_int8", (x, residual, weight, EPS)),
    ):
        own = [each.clone().contiguous() if isinstance(each, Tensor) else each for each in args]
        if op == "silu_mul_int8":
            given["out"] = torch.empty(4, 35, dtype=torch.int8)
        else:
            given["out"] = out
        found = public(op, backend)(*args, **given)
        assert found[0] is given["out"]
        assert found[1] is scales
        same(found, public(op, backend)(*own))
    before[1:-1, 8:78] += x
    assert_equal(total, before)


@pytest.mark.parametrize("backend", backends("silu_mul_int8"))
def test_a_row_that_is_not_finite_spoils_no_other(backend: str) -> None:
    gate_up = torch.randn(3, 70)
    gate_up[1, 40] = math.inf
    codes, scales = public("silu_mul_int8", backend)(gate_up)
    assert (codes[1] == 0).all()
    assert scales.isfinite().tolist() == [True, False, True]


def test_what_is_refused() -> None:
    x, weight = torch.zeros(2, 4), torch.ones(4)
    for shape in ((), (2, 0)):
        with pytest.raises(ValueError, match=r"^x has shape \[.*\]; legal: \[..., H\] with H >= 1$"):
            kernels.rms_norm_int8(torch.zeros(shape), weight, out=torch.zeros(shape).char(), scales_out=torch.zeros(2))
    with pytest.raises(ValueError, match=r"^gate_up has shape \[2, 0\]; legal: \[..., 2I\] with I >= 1$"):
        kernels.silu_mul_int8(torch.zeros(2, 0))
    with pytest.raises(TypeError, match=r"^out has dtype torch.float32; legal: torch.int8$"):
        kernels.rms_norm_int8(x, weight, out=torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"^residual has shape \[3, 4\]; legal: \[2, 4\]$"):
        kernels.add_rms_norm_int8(x, torch.zeros(3, 4), weight)
    with pytest.raises(ValueError, match=r"^scales_out has shape \[3\]; legal: \[2\]$"):
        kernels.silu_mul_int8(x, scales_out=torch.zeros(3))


@pytest.mark.parametrize("backend", backends("rms_norm_int8"))
def test_a_row_too_small_to_be_normalised_has_an_infinite_scale(backend: str) -> None:
    """1 / sqrt(0) is infinite, and by it the numbers past the end of a row, which are 0, are NaN."""
    codes, scales = public("rms_norm_int8", backend)(torch.full((1, 5), 1e-30), torch.ones(5), 0.0)
    assert (codes.tolist(), scales.tolist()) == ([[0] * 5], [math.inf])
