"""FlashInfer's norms on our ops: within a derived bound of the exact norm, in place, strided, refused by name."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama.integrations import flashinfer
from tests.integrations.flashinfer.calls import CALLS, NoHostRead, half_unit
from tests.integrations.flashinfer.conftest import Library

DTYPES = (torch.bfloat16, torch.float16)
SUMS = 2e-6  # relative, of fp32's sums and its inverse root over some hundred numbers


def exact_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def assert_norm(found: Tensor, x: Tensor, weight: Tensor, eps: float, roundings: int) -> None:
    """Each element within so many roundings of its dtype; subnormal ones within one step."""
    exact, half = exact_norm(x, weight, eps), half_unit(found.dtype)
    relative = (1 + half) ** roundings * (1 + SUMS) - 1
    absolute = torch.finfo(found.dtype).smallest_normal * half * (1 + weight.double().abs())
    assert bool(((found.double() - exact).abs() <= relative * exact.abs() + absolute).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 64), (3, 4, 32)], ids=str)
def test_rmsnorm_is_two_roundings_from_the_exact_norm(
    library: Library, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape, dtype=dtype, device=library.device)
    weight = torch.randn(shape[-1], dtype=dtype, device=library.device)
    out = torch.empty_like(x)
    assert_norm(library.module.rmsnorm(x, weight, 1e-5), x, weight, 1e-5, 2)
    library.module.rmsnorm(x, weight, eps=1e-5, out=out, enable_pdl=False)
    assert torch.equal(out, library.module.rmsnorm(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_add_rmsnorm_writes_the_sum_and_its_norm_over_its_inputs(library: Library, dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, 5, 64, dtype=dtype, device=library.device)
    weight = torch.randn(64, dtype=dtype, device=library.device)
    exact, given = x.double() + residual.double(), residual.clone()
    stored = (x.float() + residual.float()).to(dtype)
    assert library.module.fused_add_rmsnorm(x, residual, weight, 1e-5) is None
    assert torch.equal(residual, stored)
    assert not torch.equal(residual, given)
    assert_norm(x, exact, weight, 1e-5, 4)  # the sum, hence its root, then what rmsnorm rounds


def test_the_default_eps_is_theirs(library: Library) -> None:
    x = torch.full((1, 64), 1e-3, dtype=torch.float16, device=library.device)
    found = library.module.rmsnorm(x, torch.ones(64, dtype=torch.float16, device=library.device))
    assert_norm(found, x, torch.ones_like(x[0]), 1e-6, 2)


def test_in_fp32_the_bound_is_that_of_fp32() -> None:
    x, weight = torch.randn(6, 48), torch.randn(48)
    assert_norm(flashinfer.rmsnorm(x, weight), x, weight, 1e-6, 2)


def test_heads_inside_of_a_fused_projection_are_normalised_where_they_lie(library: Library) -> None:
    qkv = torch.randn(4, 6 * 32, dtype=torch.float16, device=library.device)
    weight = torch.randn(32, dtype=torch.float16, device=library.device)
    heads = qkv.view(4, 6, 32)[:, 1:4]
    before, expected = qkv.clone().view(4, 6, 32), library.module.rmsnorm(heads.contiguous(), weight)
    library.module.rmsnorm(heads, weight, out=heads)
    assert torch.equal(heads, expected)
    assert torch.equal(qkv.view(4, 6, 32)[:, [0, 4, 5]], before[:, [0, 4, 5]])


@CALLS
def test_random_legal_calls_of_rmsnorm_are_near_the_exact_norm(calls: int) -> None:
    rng = random.Random(1)
    for _ in range(calls):
        dtype = rng.choice((*DTYPES, torch.float32))
        size, rows, heads, spare = rng.randint(1, 40), rng.randint(0, 5), rng.randint(1, 4), rng.randint(0, 2)
        whole = torch.randn(rows, heads + spare, size, dtype=dtype) * rng.choice((0.1, 1, 30))
        x = whole[:, spare:] if rng.random() < 0.6 else whole[:, 0]
        weight = torch.randn(size, dtype=rng.choice((dtype, torch.float32)))
        eps, given = rng.choice((1e-6, 1e-5, 0.1)), x.clone()
        out = rng.choice((None, x, torch.empty_like(x), torch.empty(*x.shape[:-1], size + 3, dtype=dtype)[..., 1:-2]))
        found = flashinfer.rmsnorm(x, weight, eps, out, rng.choice((None, True, False)))
        assert found.shape == given.shape
        assert out is None or found is out
        assert out is x or torch.equal(x, given)
        assert_norm(found, given, weight, eps, 2)


@CALLS
def test_random_legal_calls_of_fused_add_rmsnorm_are_near_the_exact_norm(calls: int) -> None:
    rng = random.Random(2)
    for _ in range(calls):
        dtype = rng.choice((*DTYPES, torch.float32))
        size, rows = rng.randint(1, 40), rng.randint(0, 5)
        x, residual = torch.randn(2, rows, size + 2, dtype=dtype)[..., rng.randint(0, 2) :][..., :size]
        weight, eps = torch.randn(size, dtype=rng.choice((dtype, torch.float32))), rng.choice((1e-6, 0.1))
        # Of one sign, so that an element's relative error is that of its rounding alone.
        x.abs_()
        residual.abs_()
        exact, stored = x.double() + residual.double(), x + residual
        flashinfer.fused_add_rmsnorm(x, residual, weight, eps)
        assert torch.equal(residual, stored)
        assert_norm(x, exact, weight, eps, 4)


X = torch.randn(2, 4, 8, dtype=torch.float16)
ILLEGAL: list[tuple[Callable[..., Any], tuple[Any, ...], type[Exception], str]] = [
    (flashinfer.rmsnorm, (X[0, 0], X[0, 0]), ValueError, r"input has shape \[8\]; legal: \[N, H\] or"),
    (flashinfer.rmsnorm, (X[None], X[0, 0]), ValueError, r"input has shape \[1, 2, 4, 8\]; legal"),
    (flashinfer.rmsnorm, (X.double(), X[0, 0].double()), TypeError, "input has dtype torch.float64; legal"),
    (flashinfer.rmsnorm, (X.mT, X[0, :, 0]), ValueError, "input has strides .*; legal"),
    (flashinfer.rmsnorm, (X, X[0, 0, :4]), ValueError, r"weight has shape \[4\]; legal: \[8\]"),
    (flashinfer.rmsnorm, (X, X[0, 0].bfloat16()), TypeError, "weight has dtype torch.bfloat16; legal"),
    (flashinfer.rmsnorm, (X, X[0, 0], 1e-6, X[0]), ValueError, r"out has shape \[4, 8\]; legal: \[2, 4, 8\]"),
    (flashinfer.rmsnorm, (X, X[0, 0], 1e-6, X.float()), TypeError, "out has dtype torch.float32; legal"),
    (
        flashinfer.rmsnorm,
        (X, X[0, 0], 1e-6, torch.ones(2, 5, 8)[:, 1:]),
        TypeError,
        "out has dtype torch.float32; legal: torch.float16",
    ),
    (flashinfer.fused_add_rmsnorm, (X, X.clone(), X[0, 0]), ValueError, r"input has shape \[2, 4, 8\]; legal"),
    (flashinfer.fused_add_rmsnorm, (X[0], X[0, :2].clone(), X[0, 0].clone()), ValueError, "residual has shape"),
    (flashinfer.fused_add_rmsnorm, (X[0], X[0].float(), X[0, 0].clone()), TypeError, "residual has dtype"),
    (flashinfer.fused_add_rmsnorm, (X[0], X[0], X[0, 0].clone()), ValueError, "memory"),
]


@pytest.mark.parametrize(("function", "arguments", "error", "message"), ILLEGAL)
def test_what_is_illegal_is_refused_by_name_and_nothing_is_written(
    function: Callable[..., Any], arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    tensors = [each for each in arguments if isinstance(each, Tensor)]
    before = [each.clone() for each in tensors]
    with pytest.raises(error, match=message):
        function(*arguments)
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor, old)


def test_the_norms_compile_whole_and_read_nothing_on_the_host() -> None:
    x, weight = torch.randn(3, 4, 16), torch.randn(16)
    residual = torch.randn(3, 16)

    def both(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        flashinfer.fused_add_rmsnorm(x[:, 0], residual, weight)
        return flashinfer.rmsnorm(x[:, :3], weight)

    expected = both(x.clone(), residual.clone(), weight)
    with NoHostRead():
        assert both(x.clone(), residual.clone(), weight).shape == (3, 3, 16)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, residual, weight), expected, rtol=0, atol=0)
