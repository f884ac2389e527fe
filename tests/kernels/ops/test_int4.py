"""4-bit weights: the documented layout, the nearest values, and matmuls as exact as with the dequantized weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastllama import kernels
from fastllama.kernels import reference
from fastllama.testing.poison import noise_
from tests.kernels.honest import DTYPES, assert_equal, assert_honest, backends, on_cpu, public

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
    (100, 130, 384, 128),
    (0, 5, 64, 32),
    (3, 0, 128, 128),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
triton_too = pytest.mark.parametrize("backend", backends("matmul_int4"))
every_cpu = pytest.mark.parametrize("backend", on_cpu("matmul_int4"))


@dataclass(frozen=True)
class Weight:
    """Random quantized values, scales of either sign, and zeros or None, of a weight [features, size]."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    @classmethod
    def of(cls, features: int, size: int, group: int, scales: torch.dtype, zeros: torch.dtype | None = None) -> Weight:
        shape = (features, size // group)
        drawn = None
        if zeros is not None:
            drawn = torch.randint(16, shape, dtype=torch.uint8) if zeros == torch.uint8 else 15 * torch.rand(shape)
        magnitudes = (0.25 + torch.rand(shape)) / (4 * math.sqrt(size))
        codes = torch.randint(16, (features, size), dtype=torch.uint8)
        return cls(
            codes, (magnitudes * torch.randn(shape).sign()).to(scales), None if drawn is None else drawn.to(zeros)
        )

    @property
    def packed(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return kernels.pack_int4(self.codes), self.scales, self.zeros

    def exact(self) -> Tensor:
        """In fp64, group by group."""
        group = self.codes.shape[1] // self.scales.shape[1]
        zeros = torch.full_like(self.scales, 8.0) if self.zeros is None else self.zeros
        columns = torch.arange(self.codes.shape[1]) // group
        return (self.codes.double() - zeros.double()[:, columns]) * self.scales.double()[:, columns]


def check(backend: str, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """The error is at most about that of plain torch with the weight in x's dtype."""
    found = public("matmul_int4", backend)(x, *weight.packed, bias)
    exact = weight.exact()
    plain = F.linear(x, exact.to(x.dtype), bias)
    assert_honest(found, plain, F.linear(x.double(), exact, None if bias is None else bias.double()))
    return found


@pytest.mark.parametrize("shape", [(64, 128), (130, 300), (1, 1)], ids=str)
def test_the_layout_is_the_documented_one(shape: tuple[int, int]) -> None:
    """Every value is where the formula of kernels/reference/int4.py puts it; padding is 8."""
    codes = torch.randint(16, shape, dtype=torch.uint8)
    packed = kernels.pack_int4(codes)
    tall, broad = -(-shape[0] // 64), -(-shape[1] // 128)
    assert packed.shape == (tall, broad, 2, 128, 4)
    assert packed.dtype == torch.int32
    padded = torch.full((64 * tall, 128 * broad), 8)
    padded[: shape[0], : shape[1]] = codes
    n, k, half, lane, t = torch.meshgrid(*map(torch.arange, packed.shape), indexing="ij")
    w, g, q = lane // 32, lane // 4 % 8, lane % 4
    for e in (0, 1):
        for h in (0, 1):
            for r in (0, 1):
                row, column = 64 * n + 16 * w + 8 * r + g, 128 * k + 64 * half + 16 * t + 8 * h + 2 * q + e
                assert_equal(packed >> (16 * e + 8 * h + 4 * r) & 15, padded[row, column].int())


@pytest.mark.parametrize("shape", [(64, 128), (1, 1), (65, 129), (200, 64), (0, 64), (3, 1000)], ids=str)
def test_codes_come_back(shape: tuple[int, int]) -> None:
    wide = torch.randint(16, (shape[0], shape[1] + 3), dtype=torch.uint8)
    for codes in (wide[:, : shape[1]], wide[:, : shape[1]].contiguous()):
        assert_equal(kernels.unpack_int4(kernels.pack_int4(codes), *shape), codes)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 64, 128, 384])
@dtypes
def test_no_code_is_nearer(dtype: torch.dtype, group: int, symmetric: bool) -> None:
    weight = (torch.randn(9, 384) + (0 if symmetric else 0.5)).to(dtype)
    codes, scales, zeros = kernels.quantize_int4(weight, group, symmetric=symmetric)
    assert scales.shape == (9, 384 // group)
    assert (scales.dtype, zeros is None) == (dtype, symmetric)
    columns = torch.arange(384) // group
    zero = torch.full_like(scales, 8.0) if zeros is None else zeros
    every = (torch.arange(16.0)[:, None, None] - zero.double()[:, columns]) * scales.double()[:, columns]
    misses = (every - weight.double()).abs()
    assert_equal(misses.gather(0, codes.long()[None])[0], misses.amin(0))
    values, steps = weight.unflatten(1, (-1, group)), scales.abs()[:, :, None]
    if symmetric:  # the largest magnitude is 0
        at = values.abs().argmax(2, keepdim=True)
        assert (codes.unflatten(1, (-1, group)).gather(2, at) == 0).all()
    else:
        span = values.amax(2).clamp(min=0) - values.amin(2).clamp(max=0)
        torch.testing.assert_close(scales, span / 15, rtol=2 * torch.finfo(dtype).eps, atol=0)
        assert ((kernels.dequantize_int4(codes, scales, zeros).unflatten(1, (-1, group)) - values).abs() < steps).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_of_one_value(symmetric: bool) -> None:
    """Zeros stay zeros, with their own value; others, of either sign, come back but for the scale's rounding."""
    weight = torch.tensor([0.0, 3.0, -3.0]).repeat_interleave(32)[None]
    codes, scales, zeros = kernels.quantize_int4(weight, 32, symmetric=symmetric)
    torch.testing.assert_close(kernels.dequantize_int4(codes, scales, zeros), weight, rtol=1e-6, atol=0)
    assert (codes[0, :32] == (8 if zeros is None else zeros[0, 0])).all()


@pytest.mark.parametrize("zeros", [None, torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0] < 10], ids=str)
def test_the_reference_is_the_definition(shape: tuple[int, int, int, int], zeros: torch.dtype | None) -> None:
    rows, features, size, group = shape
    weight = Weight.of(features, size, group, torch.float32, zeros)
    x, bias = torch.randn(rows, size, dtype=torch.float64), torch.randn(features, dtype=torch.float64)
    found = reference.matmul_int4(x, *weight.packed, bias)
    expected = torch.tensor(
        [
            [math.fsum((x[m] * row).tolist()) + float(b) for row, b in zip(weight.exact(), bias, strict=True)]
            for m in range(rows)
        ],
        dtype=torch.float64,
    ).view(rows, features)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        reference.dequantize_int4(weight.codes, weight.scales.double(), weight.zeros), weight.exact(), rtol=0, atol=0
    )


@pytest.mark.in_turn("zeros")
@pytest.mark.parametrize("zeros", [None, torch.uint8], ids=["symmetric", "zeros"])
@shapes
@dtypes
@triton_too
def test_matmul_int4(
    backend: str, dtype: torch.dtype, shape: tuple[int, int, int, int], zeros: torch.dtype | None
) -> None:
    rows, features, size, group = shape
    x, weight = torch.randn(rows, size).to(dtype), Weight.of(features, size, group, dtype, zeros)
    check(backend, x, weight)
    check(backend, x, weight, torch.randn(features).to(dtype))


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [2, 70])
@triton_too
def test_zeros_between_codes(backend: str, rows: int, scales: torch.dtype) -> None:
    """Neither they nor scales in fp32 are rounded to x's dtype."""
    check(backend, torch.randn(rows, 256).bfloat16(), Weight.of(65, 256, 64, scales, scales))


@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@triton_too
def test_every_code_is_exact(backend: str, dtype: torch.dtype, group: int) -> None:
    """One column of x at a time: each result is a quantized value less 8, an integer in any dtype."""
    codes = torch.randint(16, (64, 256), dtype=torch.uint8)  # with no period that a layout could have
    scales = torch.ones(64, 256 // group, dtype=dtype)
    for some in torch.arange(256).split(64):
        x = F.one_hot(some, 256).to(dtype)
        found = public("matmul_int4", backend)(x, kernels.pack_int4(codes), scales)
        assert_equal(found, codes.to(dtype).T[some] - 8)


@pytest.mark.parametrize("rows", [1, 40, 66])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@triton_too
def test_long_sums_are_kept_in_fp32(backend: str, dtype: torch.dtype, rows: int) -> None:
    """4096 equal terms: a 16-bit accumulator stops growing long before the end."""
    codes, scales = torch.full((3, 4096), 12, dtype=torch.uint8), torch.full((3, 32), 1 / 16, dtype=dtype)
    found = public("matmul_int4", backend)(torch.ones(rows, 4096, dtype=dtype), kernels.pack_int4(codes), scales)
    assert_equal(found, torch.full((rows, 3), 1024.0, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@every_cpu
def test_outliers_are_heard_of_by_their_neighbours_alone(backend: str, dtype: torch.dtype) -> None:
    """An outlier times zero costs the 7 columns beside it 2^-15 of its power of two at most."""
    x, codes = torch.randn(200, 128).to(dtype), torch.full((64, 128), 8, dtype=torch.uint8)
    x[:, 69] = 1000
    codes[torch.arange(64), 64 + torch.arange(64)] = 9  # a feature is one column of the last 64
    codes[5] = 8
    found = public("matmul_int4", backend)(x, kernels.pack_int4(codes), torch.ones(64, 1, dtype=torch.float32))
    rounding = torch.finfo(dtype).eps / 2 * x[:, 64:].abs().double()
    misses = (found.double() - x[:, 64:].double()).abs() - rounding
    misses[:, 5] = found[:, 5].abs()
    beside = torch.tensor([0, 1, 4, 5, 8, 9, 12, 13])
    assert misses[:, beside].max() <= 512 * 2.0**-15
    misses[:, beside] = 0
    assert misses.max() <= 4 * 2.0**-15


@pytest.mark.parametrize("group", [32, 64, 128, 4096])
@pytest.mark.parametrize("code", [0, 7, 15])
@every_cpu
def test_no_sum_overflows(backend: str, code: int, group: int) -> None:
    """The largest 16-bit floats, all of one sign, times the largest quantized values."""
    codes, scales = torch.full((64, 4096), code, dtype=torch.uint8), torch.full((64, 4096 // group), 2.0**-12)
    packed = kernels.pack_int4(codes)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        largest = 2 - torch.finfo(dtype).eps
        x = torch.tensor([[largest], [-largest], [0.0]], dtype=dtype).expand(3, 4096).contiguous()
        expected = (x[:, :1].double() * (code - 8)).expand(3, 64).to(dtype)
        found = public("matmul_int4", backend)(x, packed, scales)
        torch.testing.assert_close(found, expected, rtol=2.0**-20 if dtype == torch.float32 else 0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", [each for each in on_cpu("matmul_int4") if each == "numba"])
def test_a_row_is_the_same_beside_others(backend: str, dtype: torch.dtype) -> None:
    x, weight = torch.randn(9, 384).to(dtype), Weight.of(70, 384, 64, dtype)
    together = public("matmul_int4", backend)(x, *weight.packed)
    for start, end in ((0, 1), (1, 3), (3, 6), (6, 9)):
        assert_equal(public("matmul_int4", backend)(x[start:end], *weight.packed), together[start:end])


@pytest.mark.parametrize("zeros", [None, torch.uint8], ids=["symmetric", "zeros"])
@pytest.mark.parametrize("rows", [1, 6, 70])
@triton_too
def test_nothing_past_the_end_is_read_or_written(backend: str, rows: int, zeros: torch.dtype | None) -> None:
    """Slices of wider buffers: huge values beside x, scales, zeros and bias, other weights after the tiles."""
    weight, bias = Weight.of(70, 96, 32, torch.bfloat16, zeros), torch.randn(70).bfloat16()
    packed, scales, kept = weight.packed
    x = torch.randn(rows, 96).bfloat16()
    wide_x, wide_scales, wide_bias = (
        noise_(torch.empty(shape, dtype=torch.bfloat16)) for shape in ((rows + 2, 160), (72, 12), (90,))
    )
    wide_x[1:-1, 24:120], wide_scales[1:-1, 4:7], wide_bias[8:78] = x, scales, bias
    wide_packed = torch.randint(-(2**31), 2**31, (3, 3, 2, 128, 4)).int()
    wide_packed[:2, :1] = packed
    if kept is not None:
        wide_zeros = torch.full((72, 12), 255, dtype=torch.uint8)
        wide_zeros[1:-1, 4:7] = kept
        kept = wide_zeros[1:-1, 4:7]
    buffer = torch.full((rows + 2, 90), 7.0, dtype=torch.bfloat16)
    out = buffer[1:-1, 8:78]
    given = (wide_x[1:-1, 24:120], wide_packed[:2, :1], wide_scales[1:-1, 4:7], kept, wide_bias[8:78])
    assert public("matmul_int4", backend)(*given, out=out) is out
    assert_equal(out.contiguous(), check(backend, x, weight, bias))
    buffer[1:-1, 8:78] = 7.0
    assert (buffer == 7.0).all()


@pytest.mark.parametrize("leading", [(), (2, 3), (1, 1, 4), (2, 0), (2, 40)])
@triton_too
def test_any_number_of_leading_dimensions(backend: str, leading: tuple[int, ...]) -> None:
    weight, x = Weight.of(5, 64, 32, torch.float16), torch.randn(*leading, 64).half()
    found = public("matmul_int4", backend)(x, *weight.packed)
    assert_equal(found, public("matmul_int4", backend)(x.view(-1, 64), *weight.packed).view(*leading, 5))


@pytest.mark.parametrize("zeros", [None, torch.uint8], ids=["symmetric", "zeros"])
@pytest.mark.parametrize("rows", [3, 70])
@triton_too
def test_nan_stays_in_its_row(backend: str, rows: int, zeros: torch.dtype | None) -> None:
    weight, x = Weight.of(70, 64, 64, torch.float32, zeros), torch.randn(rows, 64)
    expected = public("matmul_int4", backend)(x, *weight.packed)
    x[1, 5] = math.nan
    found = public("matmul_int4", backend)(x, *weight.packed)
    assert found[1].isnan().all()
    others = torch.arange(rows) != 1
    assert_equal(found[others], expected[others])


@pytest.mark.parametrize("backend", ["cpu"])
def test_more_features_than_are_widened_at_a_time(backend: str) -> None:
    check(backend, torch.randn(3, 64), Weight.of(1100, 64, 32, torch.float32, torch.uint8), torch.randn(1100))


def arguments() -> dict[str, Tensor]:
    packed, scales, zeros = Weight.of(70, 192, 64, torch.float32, torch.uint8).packed
    assert zeros is not None
    return {"x": torch.randn(2, 192), "packed": packed, "scales": scales, "zeros": zeros}


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("x", torch.zeros(2, 0), ValueError, r"^x has shape \[2, 0\]; legal: \[..., K\] with K >= 1$"),
        ("x", torch.zeros(()), ValueError, r"^x has shape \[\]; legal: \[..., K\] with K >= 1$"),
        ("x", torch.zeros(2, 320), ValueError, r"^packed has shape .*; legal: \[2, 3, 2, 128, 4\]$"),
        (
            "x",
            torch.zeros(2, 191),
            ValueError,
            r"^scales has shape \[70, 3\]; legal: \[70, 191 / G\], G 32, 64, 128 or",
        ),
        ("scales", torch.zeros(70, 12), ValueError, r"^scales has shape \[70, 12\]; legal: \[70, 192 / G\]"),
        ("scales", torch.zeros(70, 0), ValueError, r"^scales has shape \[70, 0\]; legal: \[70, 192 / G\]"),
        ("scales", torch.zeros(129, 3), ValueError, r"^packed has shape .*; legal: \[3, 2, 2, 128, 4\]$"),
        ("zeros", torch.zeros(70, 1), ValueError, r"^zeros has shape \[70, 1\]; legal: \[70, 3\]$"),
        (
            "zeros",
            torch.zeros(70, 3).int(),
            TypeError,
            "^zeros has dtype torch.int32; legal: torch.uint8, torch.float32$",
        ),
        ("bias", torch.zeros(71), ValueError, r"^bias has shape \[71\]; legal: \[70\]$"),
        ("out", torch.zeros(2, 64), ValueError, r"^out has shape \[2, 64\]; legal: \[2, 70\]$"),
        ("workspace", torch.zeros(2, 2), ValueError, r"^workspace has shape \[2, 2\]; legal: \[2\]$"),
        ("workspace", torch.zeros(9).int(), TypeError, "^workspace has dtype torch.int32; legal: torch.float32$"),
    ],
)
def test_what_is_refused(name: str, value: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kernels.matmul_int4(**arguments() | {name: value})


def test_tiles_that_are_not_in_a_run() -> None:
    given = arguments()
    packed = given["packed"].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match=r"^packed has strides \[.*\]; legal: contiguous but for the first dimension$"):
        kernels.matmul_int4(**given | {"packed": packed})


def test_what_cannot_be_packed_or_rounded() -> None:
    weight, codes = torch.ones(3, 96), torch.zeros(3, 96, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"^codes holds 16; legal: 0 to 15$"):
        kernels.pack_int4(codes + 16)
    with pytest.raises(TypeError, match=r"^codes has dtype torch.int32"):
        kernels.pack_int4(codes.int())
    with pytest.raises(ValueError, match=r"^packed has shape \[1, 1, 2, 128, 4\]; legal: \[2, 1, 2, 128, 4\]$"):
        kernels.unpack_int4(kernels.pack_int4(codes), 65, 96)
    for group in (64, 48, 0):
        with pytest.raises(ValueError, match=rf"^group_size is {group}; legal for K = 96: a divisor, of"):
            kernels.quantize_int4(weight, group)
    with pytest.raises(TypeError, match=r"^weight has dtype torch.int32"):
        kernels.quantize_int4(weight.int(), 32)
    weight[2, 95] = math.inf
    with pytest.raises(ValueError, match=r"^weight holds infinities or NaN; legal: finite values$"):
        kernels.quantize_int4(weight, 32)
    with pytest.raises(ValueError, match=r"^scales has shape \[3, 2\]; legal: \[3, 96 / G\], G 32, 64, 128 or 96$"):
        kernels.dequantize_int4(codes, torch.ones(3, 2))


def test_no_scratch_memory_on_a_cpu() -> None:
    given = arguments()
    assert kernels.matmul_int4_workspace(given["x"], given["packed"], given["scales"]).shape == (0,)
