"""Poisoned memory shows what was not written and what should not have been read."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from fastllama.testing.interpreter import repaired
from fastllama.testing.poison import noise_, poisoned, surrounded

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]


def test_fresh_memory_is_poisoned_and_the_mode_put_back() -> None:
    torch.use_deterministic_algorithms(False)
    with poisoned():
        assert torch.empty(3).isnan().all()
        assert (torch.empty(3, dtype=torch.int32) == 2**31 - 1).all()
    assert not torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    with pytest.raises(ZeroDivisionError), poisoned():
        raise ZeroDivisionError
    assert torch.get_deterministic_debug_mode() == 2


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_noise_is_huge_finite_and_of_either_sign(dtype: torch.dtype) -> None:
    x = torch.empty(50, 3, dtype=dtype)
    assert noise_(x) is x
    wide = x.double()
    assert wide.isfinite().all()
    assert (wide.abs() >= 0.49 * min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)).all()
    assert (wide > 0).any()
    assert (wide < 0).any()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64], ids=str)
def test_noise_of_integers_spans_their_range(dtype: torch.dtype) -> None:
    x = noise_(torch.zeros(400, dtype=dtype)).double()
    limits = torch.iinfo(dtype)
    quarter = (limits.max - limits.min) / 4
    assert x.min() < limits.min + quarter
    assert x.max() > limits.max - quarter


def test_what_surrounds_a_tensor_is_noise() -> None:
    x = torch.randn(2, 3, 5)
    with surrounded(x, margin=4) as inner:
        assert torch.equal(inner, x)
        assert inner.stride() == (39, 13, 1)
        outside = inner.as_strided((inner.untyped_storage().nbytes() // 4,), (1,), 0).abs() > 1e38
        assert outside.sum() == 6 * 8
        inner.zero_()


def test_a_write_beside_a_tensor_is_found() -> None:
    message = r"^memory next to a tensor of shape \[2, 5\] was written, in 1 of its rows$"
    with pytest.raises(AssertionError, match=message), surrounded(torch.randn(2, 5), margin=4) as inner:
        inner.as_strided((1,), (1,), 4 + 5).zero_()


# One program owns a row, of which HELD columns are read and WRITTEN ones written.
@triton.jit
def shift_kernel(out_ptr, x_ptr, stride, HELD: tl.constexpr, WRITTEN: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    row = tl.program_id(0)
    x = tl.load(x_ptr + row * stride + i, mask=i < HELD, other=0.0)
    tl.store(out_ptr + row * stride + i, x - tl.sum(x, 0) / 5, mask=i < WRITTEN)


@pytest.mark.interpreter
@pytest.mark.parametrize("held", [5, 6])
def test_a_mask_forgotten_in_a_load_leaves_a_trace(held: int) -> None:
    x = torch.randn(3, 5)
    with repaired(), surrounded(x) as inner, surrounded(x) as out:
        shift_kernel[(3,)](out, inner, inner.stride(0), HELD=held, WRITTEN=5, BLOCK=8)
        same = torch.allclose(out, x - x.mean(-1, keepdim=True), atol=1e-6)
    assert same == (held == 5)


@pytest.mark.interpreter
def test_a_mask_forgotten_in_a_store_is_found() -> None:
    x = torch.randn(3, 5)
    with pytest.raises(AssertionError, match="was written, in 3 of its rows"), repaired(), surrounded(x) as inner:
        shift_kernel[(3,)](inner, inner, inner.stride(0), HELD=5, WRITTEN=6, BLOCK=8)
