"""Fused matmuls of every weight format and backend: norm prologue, SwiGLU and residual epilogues."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastllama import kernels
from fastllama.kernels import reference
from fastllama.kernels.dispatch.op import OPS
from tests.kernels.honest import DTYPES, assert_equal, assert_honest, backends, double, on_cpu, public

FORMS = ("norm", "residual", "gated", "norm, gated", "norm, residual")
# rows, K, N: the kernel's smallest and a larger tile, and torch's matmul; N of half tiles and whole ones
SHAPES = [(1, 512, 90), (3, 192, 256), (17, 128, 130), (65, 64, 70)]


def weight_of(op: str, features: int, size: int) -> tuple[tuple[Any, ...], Tensor]:
    """An op's arguments for a random weight, and the weight [N, K] in fp64."""
    weight = torch.randn(features, size) / math.sqrt(size)
    if op == "matmul":
        return (weight,), weight.double()
    if op == "matmul_bf12":
        return kernels.pack_bf12(weight.bfloat16()), weight.bfloat16().double()
    if op == "matmul_int8":
        codes, scales = kernels.quantize_int8(weight, 32)
        return (kernels.pack_int8(codes), scales), kernels.dequantize_int8(codes, scales.double())
    codes, scales, _ = kernels.quantize_int4(weight, 32)
    return (kernels.pack_int4(codes), scales), kernels.dequantize_int4(codes, scales.double())


def around(form: str, x: Tensor, features: int) -> dict[str, Any]:
    """The options of a fused form; a norm's weight is in x's dtype or in fp32."""
    given: dict[str, Any] = {"gated": "gated" in form}
    if "norm" in form:
        norm = torch.rand(x.shape[-1])
        given |= {"norm": norm if form == "norm, residual" else norm.to(x.dtype), "eps": 0.5}
    if "residual" in form:
        given["residual"] = torch.randn(*x.shape[:-1], features).to(x.dtype)
    return given


def plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """torch's own ops, one after another."""
    y = F.linear(x if norm is None else reference.rms_norm(x, norm, eps), weight, bias)
    if gated:
        gate, up = y.chunk(2, -1)
        y = F.silu(gate) * up
    return y if residual is None else y + residual


CASES = [
    pytest.param(op, each.values[0] if hasattr(each, "values") else each, marks=getattr(each, "marks", ()))
    for op in ("matmul", "matmul_bf12", "matmul_int4", "matmul_int8")
    for each in (on_cpu(op) if op == "matmul_bf12" else backends(op))
]


@pytest.mark.in_turn("dtype")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("op", "backend"), CASES)
def test_it_is_the_composition(op: str, backend: str, form: str, dtype: torch.dtype) -> None:
    """The composition of torch's ops and the plain matmul, whose own errors are tested elsewhere."""
    for rows, size, features in SHAPES:
        x = torch.randn(rows, size).to(dtype)
        given, weight = weight_of(op, features, size)
        if op == "matmul":
            given, weight = (given[0].to(dtype),), given[0].to(dtype).double()
        elif op != "matmul_bf12":
            given = (given[0], given[1].float())
        options, bias = around(form, x, features), torch.randn(features).to(dtype)
        found = public(op, backend)(x, *given, bias=bias, **options)
        exact = reference.matmul(
            x.double(), weight, bias.double(), **dict(zip(options, double(*options.values()), strict=True))
        )
        assert_honest(found, plain(x, weight.to(dtype), bias, **options), exact)


@pytest.mark.parametrize("rows", [2, 70])
@pytest.mark.parametrize(("op", "backend"), CASES)
def test_the_sum_may_be_in_place(op: str, backend: str, rows: int) -> None:
    x, (given, _) = torch.randn(rows, 64), weight_of(op, 12, 64)
    residual = torch.randn(rows, 12)
    expected = public(op, backend)(x, *given, residual=residual)
    assert public(op, backend)(x, *given, residual=residual, out=residual) is residual
    assert_equal(residual, expected)


@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", backends("matmul"))
def test_large_rows_are_normalised_without_leaving_the_range(backend: str, dtype: torch.dtype, rows: int) -> None:
    """x times the norm's weight is beyond fp16, and so would be the sum of squares in either."""
    x = torch.full((rows, 256), 3e4).to(dtype)
    weight, norm = torch.full((4, 256), 1 / 256).to(dtype), torch.full((256,), 8.0).to(dtype)
    found = public("matmul", backend)(x, weight, norm=norm)
    torch.testing.assert_close(found, torch.full((rows, 4), 8.0).to(dtype))


@pytest.mark.parametrize(("op", "backend"), CASES)
def test_what_is_not_legal(op: str, backend: str) -> None:
    (given, _), x = weight_of(op, 7, 64), torch.randn(2, 64)
    run = public(op, backend)
    out = torch.full((2, 7), 3.0)
    for options, message in (
        ({"gated": True}, "^gated is True; legal for a weight of 7 rows, which is odd: False$"),
        ({"norm": torch.ones(63)}, r"^norm has shape \[63\]; legal: \[64\]$"),
        ({"residual": torch.ones(2, 8)}, r"^residual has shape \[2, 8\]; legal: \[2, 7\]$"),
        ({"residual": torch.ones(7)}, r"^residual has shape \[7\]; legal: \[2, 7\]$"),
    ):
        with pytest.raises(ValueError, match=message):
            run(x, *given, **options, out=out)
    with pytest.raises(TypeError, match=r"^norm has dtype torch\.float64"):
        run(x, *given, norm=torch.ones(64).double(), out=out)
    (even, _), half = weight_of(op, 8, 64), torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"^residual is a tensor; legal where gated is True: None$"):
        run(x, *even, gated=True, residual=half)
    assert (out == 3.0).all()


def test_every_matmul_takes_them() -> None:
    """Except matmul_w8a8, whose x is quantized already."""
    names = {"norm", "eps", "residual", "gated"}
    taking = {op.name for op in OPS.values() if names <= set(op.names)}
    assert taking == {name for name in OPS if name.startswith("matmul")} - {"matmul_w8a8"}
