"""`deterministic` matmuls are batch-invariant, with every fused prologue and epilogue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama import kernels
from tests.kernels.honest import DTYPES, assert_equal
from tests.kernels.ops.test_fusion import FORMS, around, weight_of

OPS_OF_PRODUCTS = ("matmul", "matmul_bf12", "matmul_int4", "matmul_int8")


def shuffled(x: Tensor, options: dict[str, Any], order: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The rows in another order."""
    residual = options.get("residual")
    return x[order], options if residual is None else options | {"residual": residual[order]}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["", *FORMS])
@pytest.mark.parametrize("op", OPS_OF_PRODUCTS)
def test_on_a_cpu(op: str, form: str, dtype: torch.dtype, backend: str, force: Callable[[str], None]) -> None:
    force(backend)
    product, x = getattr(kernels, op), torch.randn(37, 192).to(dtype)
    weight, _ = weight_of(op, 66, 192)
    weight = tuple(each.to(dtype) if isinstance(each, Tensor) and op == "matmul" else each for each in weight)
    options = around(form, x, 66) | {"deterministic": True}
    whole = product(x, *weight, **options)
    for rows in (1, 2, 5, 36):
        order = torch.randperm(37)[:rows]
        some, given = shuffled(x, options, order)
        assert_equal(product(some, *weight, **given), whole[order])


@pytest.mark.interpreter
@pytest.mark.parametrize("form", ["", "norm, residual", "norm, gated"])
@pytest.mark.parametrize("op", ["matmul", "matmul_int4", "matmul_int8"])
def test_on_triton(op: str, form: str, force: Callable[[str], None]) -> None:
    """With more rows than the kernels take."""
    force("triton")
    product, x = getattr(kernels, op), torch.randn(70, 128).bfloat16()
    weight, exact = weight_of(op, 128, 128)
    weight = (exact.bfloat16(),) if op == "matmul" else weight
    options = around(form, x, 128) | {"deterministic": True}
    order = torch.cat([torch.arange(60, 70), torch.arange(9)])
    some, given = shuffled(x, options, order)
    assert_equal(product(some, *weight, **given), product(x, *weight, **options)[order])


def test_any_leading_dimensions_in_place() -> None:
    x, weight, stream = torch.randn(2, 3, 64), torch.randn(32, 64), torch.randn(2, 3, 32)
    expected = kernels.matmul(x.view(6, 64), weight, residual=stream.view(6, 32).clone(), deterministic=True)
    found = kernels.matmul(x, weight, residual=stream, out=stream, deterministic=True)
    assert found is stream
    assert_equal(found, expected.view(2, 3, 32))
    assert kernels.matmul(torch.empty(0, 64), weight, deterministic=True).shape == (0, 32)


def test_what_is_wrong_is_refused_before_anything_is_written() -> None:
    out = torch.zeros(9, 32)
    with pytest.raises(ValueError, match=r"^out has shape \[9, 32\]; legal: \[6, 32\]$"):
        kernels.matmul(torch.randn(6, 64), torch.randn(32, 64), out=out, deterministic=True)
    assert (out == 0).all()
