"""8-bit weights: the documented layout, the nearest values, and matmuls as exact as with the dequantized weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastllama import kernels
from fastllama.kernels import reference
from fastllama.kernels.launch import device
from fastllama.testing.poison import noise_
from tests.kernels.honest import DTYPES, assert_equal, assert_honest, backends, on_cpu, public

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.mark.parametrize("shape", [(64, 128), (130, 300), (1, 1)], ids=str)
def test_the_layout_is_the_documented_one(shape: tuple[int, int]) -> None:
    """Every value is where the formula of kernels/reference/int8.py puts it; padding is 0."""
    codes = torch.randint(-128, 128, shape, dtype=torch.int8)
    packed = kernels.pack_int8(codes)
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
        assert_equal(kernels.unpack_int8(kernels.pack_int8(codes), *shape), codes)


@pytest.mark.parametrize("group", [32, 64, 128, 384])
@dtypes
def test_no_code_is_nearer(dtype: torch.dtype, group: int) -> None:
    weight = torch.randn(9, 384).to(dtype)
    codes, scales = kernels.quantize_int8(weight, group)
    assert (scales.shape, scales.dtype) == ((9, 384 // group), dtype)
    columns = torch.arange(384) // group
    every = torch.arange(-128.0, 128)[:, None, None] * scales.double()[:, columns]
    misses = (every - weight.double()).abs()
    assert_equal(misses.gather(0, codes.long()[None] + 128)[0], misses.amin(0))
    values = weight.unflatten(1, (-1, group))
    at = values.abs().argmax(2, keepdim=True)  # the largest magnitude is 127, with its sign
    assert_equal(codes.unflatten(1, (-1, group)).gather(2, at), (127 * values.gather(2, at).sign()).to(torch.int8))


def test_groups_of_one_value() -> None:
    """Zeros stay zeros; others, of either sign, come back but for the scale's rounding."""
    weight = torch.tensor([0.0, 3.0, -3.0]).repeat_interleave(32)[None]
    codes, scales = kernels.quantize_int8(weight, 32)
    assert_equal(codes, torch.tensor([0, 127, -127], dtype=torch.int8).repeat_interleave(32)[None])
    torch.testing.assert_close(kernels.dequantize_int8(codes, scales), weight, rtol=1e-6, atol=0)


# rows of x, N, K, group: every width of a tile, its edges, and what the kernel for many rows takes
SHAPES = [
    (1, 65, 256, 128),
    (2, 1, 100, 100),
    (3, 70, 192, 64),
    (16, 129, 96, 32),
    (17, 63, 320, 64),
    (2, 64, 1, 1),
    (33, 130, 65, 65),
    (64, 7, 384, 384),
    (65, 66, 224, 32),
    (70, 66, 100, 100),
    (300, 130, 384, 128),
    (0, 5, 64, 32),
    (3, 0, 128, 128),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
ASSEMBLY = "triton, assembly"  # as for NVIDIA
triton_too = pytest.mark.parametrize(
    "backend", [*backends("matmul_int8"), pytest.param(ASSEMBLY, marks=pytest.mark.interpreter)]
)


def product(backend: str) -> Callable[..., Tensor]:
    """matmul_int8 on one backend."""
    if backend != ASSEMBLY:
        return public("matmul_int8", backend)
    run = public("matmul_int8", "triton")

    def assembled(*args: Any, **options: Any) -> Tensor:
        with mock.patch.object(device, "device_info", return_value=replace(device.CPU, arch="sm_90")):
            return run(*args, **options)

    return assembled


@dataclass(frozen=True)
class Weight:
    """Random quantized values, and scales of either sign, of a weight [features, size]."""

    codes: Tensor
    scales: Tensor

    @classmethod
    def of(cls, features: int, size: int, group: int, scales: torch.dtype) -> Weight:
        shape = (features, size // group)
        magnitudes = (0.25 + torch.rand(shape)) / (64 * math.sqrt(size))
        codes = torch.randint(-128, 128, (features, size), dtype=torch.int8)
        return cls(codes, (magnitudes * torch.randn(shape).sign()).to(scales))

    @property
    def packed(self) -> tuple[Tensor, Tensor]:
        return kernels.pack_int8(self.codes), self.scales

    def exact(self) -> Tensor:
        """In fp64, group by group."""
        group = self.codes.shape[1] // self.scales.shape[1]
        return self.codes.double() * self.scales.double()[:, torch.arange(self.codes.shape[1]) // group]


def check(backend: str, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """The error is at most about that of plain torch with the weight in x's dtype."""
    found = product(backend)(x, *weight.packed, bias)
    exact = weight.exact()
    plain = F.linear(x, exact.to(x.dtype), bias)
    assert_honest(found, plain, F.linear(x.double(), exact, None if bias is None else bias.double()))
    return found


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0] < 10], ids=str)
def test_the_reference_is_the_definition(shape: tuple[int, int, int, int]) -> None:
    rows, features, size, group = shape
    weight = Weight.of(features, size, group, torch.float32)
    x, bias = torch.randn(rows, size, dtype=torch.float64), torch.randn(features, dtype=torch.float64)
    found = reference.matmul_int8(x, *weight.packed, bias)
    expected = torch.tensor(
        [
            [math.fsum((x[m] * row).tolist()) + float(b) for row, b in zip(weight.exact(), bias, strict=True)]
            for m in range(rows)
        ],
        dtype=torch.float64,
    ).view(rows, features)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert_equal(reference.dequantize_int8(weight.codes, weight.scales.double()), weight.exact())


@pytest.mark.in_turn("dtype")
@shapes
@dtypes
@triton_too
def test_matmul_int8(backend: str, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    rows, features, size, group = shape
    x, weight = torch.randn(rows, size).to(dtype), Weight.of(features, size, group, dtype)
    check(backend, x, weight)
    check(backend, x, weight, torch.randn(features).to(dtype))


@pytest.mark.parametrize("rows", [2, 70])
@triton_too
def test_scales_in_fp32_are_not_rounded(backend: str, rows: int) -> None:
    check(backend, torch.randn(rows, 256).bfloat16(), Weight.of(65, 256, 64, torch.float32))


@pytest.mark.in_turn("group")
@pytest.mark.parametrize("group", [32, 64, 128, 256])
@dtypes
@triton_too
def test_every_code_is_exact(backend: str, dtype: torch.dtype, group: int) -> None:
    """One column of x at a time: each result is a quantized value, an 8-bit integer in any dtype."""
    codes = torch.randint(-128, 128, (64, 256), dtype=torch.int8)  # with no period that a layout could have
    scales = torch.ones(64, 256 // group, dtype=dtype)
    for rows in (16 if dtype == torch.float32 else 64, 256):  # by quantized values, and by the dequantized weight
        for some in torch.arange(256).split(rows):
            found = product(backend)(F.one_hot(some, 256).to(dtype), kernels.pack_int8(codes), scales)
            assert_equal(found, codes.to(dtype).T[some])


@pytest.mark.parametrize("group", [32, 128, 4096])
@pytest.mark.parametrize("code", [-128, 127])
@pytest.mark.parametrize("backend", on_cpu("matmul_int8"))
def test_no_sum_overflows(backend: str, code: int, group: int) -> None:
    """The largest 16-bit floats, all of one sign, times the largest quantized values."""
    codes, scales = torch.full((64, 4096), code, dtype=torch.int8), torch.full((64, 4096 // group), 2.0**-12)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        largest = 2 - torch.finfo(dtype).eps
        x = torch.tensor([[largest], [-largest], [0.0]], dtype=dtype).expand(3, 4096).contiguous()
        expected = (x[:, :1].double() * code).expand(3, 64).to(dtype)
        found = public("matmul_int8", backend)(x, kernels.pack_int8(codes), scales)
        torch.testing.assert_close(found, expected, rtol=2.0**-20 if dtype == torch.float32 else 0, atol=0)


@pytest.mark.in_turn("rows")
@pytest.mark.parametrize("rows", [1, 40, 66])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@triton_too
def test_long_sums_are_kept_in_fp32(backend: str, dtype: torch.dtype, rows: int) -> None:
    """4096 equal terms: a 16-bit accumulator stops growing long before the end."""
    codes, scales = torch.full((3, 4096), 64, dtype=torch.int8), torch.full((3, 32), 1 / 256, dtype=dtype)
    found = product(backend)(torch.ones(rows, 4096, dtype=dtype), kernels.pack_int8(codes), scales)
    assert_equal(found, torch.full((rows, 3), 1024.0, dtype=dtype))


@pytest.mark.parametrize("rows", [1, 6, 70])
@triton_too
def test_nothing_past_the_end_is_read_or_written(backend: str, rows: int) -> None:
    """Slices of wider buffers: huge values beside x, scales and bias, other weights after the tiles."""
    weight, bias = Weight.of(70, 96, 32, torch.bfloat16), torch.randn(70).bfloat16()
    packed, scales = weight.packed
    x = torch.randn(rows, 96).bfloat16()
    wide_x, wide_scales, wide_bias = (
        noise_(torch.empty(shape, dtype=torch.bfloat16)) for shape in ((rows + 2, 160), (72, 12), (90,))
    )
    wide_x[1:-1, 24:120], wide_scales[1:-1, 4:7], wide_bias[8:78] = x, scales, bias
    wide_packed = torch.randint(-128, 128, (3, 3, 4, 128, 16), dtype=torch.int8)
    wide_packed[:2, :1] = packed
    buffer = torch.full((rows + 2, 90), 7.0, dtype=torch.bfloat16)
    out = buffer[1:-1, 8:78]
    given = (wide_x[1:-1, 24:120], wide_packed[:2, :1], wide_scales[1:-1, 4:7], wide_bias[8:78])
    assert product(backend)(*given, out=out) is out
    assert_equal(out.contiguous(), check(backend, x, weight, bias))
    buffer[1:-1, 8:78] = 7.0
    assert (buffer == 7.0).all()


@pytest.mark.parametrize("leading", [(), (2, 3), (1, 1, 4), (2, 0), (2, 40)])
@triton_too
def test_any_number_of_leading_dimensions(backend: str, leading: tuple[int, ...]) -> None:
    weight, x = Weight.of(5, 64, 32, torch.float16), torch.randn(*leading, 64).half()
    found = product(backend)(x, *weight.packed)
    assert_equal(found, product(backend)(x.view(-1, 64), *weight.packed).view(*leading, 5))


@pytest.mark.parametrize("rows", [3, 70])
@triton_too
def test_nan_stays_in_its_row(backend: str, rows: int) -> None:
    weight, x = Weight.of(70, 64, 64, torch.float32), torch.randn(rows, 64)
    expected = product(backend)(x, *weight.packed)
    x[1, 5] = math.nan
    found = product(backend)(x, *weight.packed)
    assert found[1].isnan().all()
    others = torch.arange(rows) != 1
    assert_equal(found[others], expected[others])


def test_more_features_than_are_widened_at_a_time() -> None:
    check("cpu", torch.randn(3, 64), Weight.of(1100, 64, 32, torch.float32), torch.randn(1100))


def arguments() -> dict[str, Tensor]:
    packed, scales = Weight.of(70, 192, 64, torch.float32).packed
    return {"x": torch.randn(2, 192), "packed": packed, "scales": scales}


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("x", torch.zeros(2, 0), ValueError, r"^x has shape \[2, 0\]; legal: \[..., K\] with K >= 1$"),
        ("x", torch.zeros(2, 320), ValueError, r"^packed has shape .*; legal: \[2, 3, 4, 128, 16\]$"),
        ("packed", torch.zeros(2, 2, 2, 128, 4).int(), ValueError, r"^packed has shape .*; legal: \[2, 2, 4, 128, 16"),
        ("packed", torch.zeros(2, 2, 4, 128, 16).byte(), TypeError, "^packed has dtype torch.uint8; legal: torch.int8"),
        ("scales", torch.zeros(70, 12), ValueError, r"^scales has shape \[70, 12\]; legal: \[70, 192 / G\]"),
        ("scales", torch.zeros(129, 3), ValueError, r"^packed has shape .*; legal: \[3, 2, 4, 128, 16\]$"),
        ("bias", torch.zeros(71), ValueError, r"^bias has shape \[71\]; legal: \[70\]$"),
        ("out", torch.zeros(2, 64), ValueError, r"^out has shape \[2, 64\]; legal: \[2, 70\]$"),
        ("workspace", torch.zeros(9).int(), TypeError, "^workspace has dtype torch.int32; legal: torch.float32$"),
    ],
)
def test_what_is_refused(name: str, value: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kernels.matmul_int8(**arguments() | {name: value})


def test_tiles_that_are_not_in_a_run() -> None:
    given = arguments()
    packed = given["packed"].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match=r"^packed has strides \[.*\]; legal: contiguous but for the first dimension$"):
        kernels.matmul_int8(**given | {"packed": packed})


def test_what_cannot_be_packed_or_rounded() -> None:
    weight, codes = torch.ones(3, 96), torch.zeros(3, 96, dtype=torch.int8)
    with pytest.raises(TypeError, match=r"^codes has dtype torch.uint8"):
        kernels.pack_int8(codes.byte())
    with pytest.raises(ValueError, match=r"^packed has shape .*; legal: \[2, 1, 4, 128, 16\]$"):
        kernels.unpack_int8(kernels.pack_int8(codes), 65, 96)
    with pytest.raises(ValueError, match=r"^group_size is 64; legal for K = 96: a divisor, of"):
        kernels.quantize_int8(weight, 64)
    weight[2, 95] = math.nan
    with pytest.raises(ValueError, match=r"^weight holds infinities or NaN; legal: finite values$"):
        kernels.quantize_int8(weight, 32)
    with pytest.raises(ValueError, match=r"^scales has shape \[3, 2\]; legal: \[3, 96 / G\], G 32, 64, 128 or 96$"):
        kernels.dequantize_int8(codes, torch.ones(3, 2))
    with pytest.raises(TypeError, match=r"^scales has dtype torch.int32"):
        kernels.dequantize_int8(codes, torch.ones(3, 3).int())


def test_no_scratch_memory_on_a_cpu() -> None:
    assert kernels.matmul_int8_workspace(**arguments()).shape == (0,)
