"""int8 rows times int8 weights: rows rounded to the nearest value, and sums that are exact in any order."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastllama import kernels
from fastllama.kernels import reference
from fastllama.kernels.launch import heuristics
from fastllama.kernels.launch.device import Device
from fastllama.kernels.reference.w8a8 import MOST_COLUMNS
from fastllama.testing.poison import noise_
from tests.kernels.honest import DTYPES, assert_equal, assert_honest, backends, on_cpu, public
from tests.kernels.launch.test_heuristics import assert_legal, devices, sizes

# rows of x, N, K: every width of a tile, its edges, splits of K and none
SHAPES = [
    (1, 65, 256),
    (2, 1, 100),
    (16, 130, 1),
    (17, 129, 96),
    (33, 63, 1100),
    (65, 66, 224),
    (130, 257, 65),
    (300, 130, 384),
    (0, 5, 64),
    (3, 0, 128),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
multiplied = pytest.mark.parametrize("backend", backends("matmul_w8a8"))
rounded = pytest.mark.parametrize("backend", backends("quantize_rows"))


def drawn(rows: int, features: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random int8 values of x and the weight, with scales of either sign for the weight."""
    x, codes = (torch.randint(-128, 128, (count, size), dtype=torch.int8) for count in (rows, features))
    scales = (0.25 + torch.rand(features)) * torch.randn(features).sign() / (64 * math.sqrt(size))
    return x, torch.rand(rows) / 64, codes, scales.to(dtype)


def check(backend: str, x: Tensor, x_scales: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """The error is at most about that of plain torch on the dequantized values."""
    found = public("matmul_w8a8", backend)(x, x_scales, kernels.pack_int8(codes), scales, bias)
    left, right = x * x_scales[:, None], codes * scales.float()[:, None]
    plain = F.linear(left.to(scales.dtype), right.to(scales.dtype), bias)
    exact = F.linear(
        x * x_scales.double()[:, None], codes * scales.double()[:, None], None if bias is None else bias.double()
    )
    assert_honest(found, plain, exact)
    return found


@pytest.mark.parametrize("shape", [(5, 384), (1, 1), (3, 100), (0, 7), (2, 3, 70), (9000, 3)], ids=str)
@dtypes
@rounded
def test_no_code_is_nearer(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Under the scale of the largest magnitude: off by half a step at most, and fp32's rounding."""
    x = (torch.randn(shape) * torch.rand(*shape[:-1], 1)).to(dtype)
    codes, scales = public("quantize_rows", backend)(x)
    assert (codes.dtype, scales.dtype, scales.shape) == (torch.int8, torch.float32, shape[:-1])
    if x.numel():
        assert_equal(scales, (x.double().abs().amax(-1) / 127).float())
        assert ((codes * scales.double()[..., None] - x).abs() <= 0.50001 * scales.double()[..., None]).all()
        assert (codes.abs().amax(-1) == 127).all()


@rounded
def test_every_backend_gives_the_references_bits(backend: str) -> None:
    x = torch.randn(40, 300).bfloat16() * torch.logspace(-30, 30, 40)[:, None].bfloat16()
    for found, expected in zip(public("quantize_rows", backend)(x), reference.quantize_rows(x), strict=True):
        assert_equal(found, expected)


@rounded
def test_rows_without_a_scale(backend: str) -> None:
    """Zeros stay zeros; an infinity or a NaN spoils its own row alone."""
    x = torch.randn(5, 70)
    x[0], x[1, 3], x[2, 69], x[3, 0] = 0, math.inf, math.nan, -math.inf
    codes, scales = public("quantize_rows", backend)(x)
    assert (codes[:4] == 0).all()
    assert 0 < scales[0] < 1e-30
    assert torch.equal(scales[1:4].isfinite(), torch.tensor([False] * 3))
    assert scales[2].isnan()
    y = kernels.matmul_w8a8(codes, scales, kernels.pack_int8(torch.ones(3, 70, dtype=torch.int8)), torch.ones(3))
    assert_equal(y.isnan().any(1), torch.tensor([False, True, True, True, False]))


@shapes
@dtypes
@multiplied
def test_matmul_w8a8(backend: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    given = drawn(*shape, dtype)
    check(backend, *given, None)
    check(backend, *given, torch.randn(shape[1]).to(dtype))


@multiplied
def test_scales_and_bias_in_fp32(backend: str) -> None:
    """They are not rounded to out's dtype."""
    x, x_scales, codes, scales = drawn(20, 70, 200, torch.float32)
    bias, out = torch.randn(70), torch.empty(20, 70, dtype=torch.bfloat16)
    given = (x, x_scales, kernels.pack_int8(codes), scales, bias)
    found = public("matmul_w8a8", backend)(*given, out=out)
    assert_equal(found, public("matmul_w8a8", backend)(*given).bfloat16())


@pytest.mark.parametrize("size", [28672, MOST_COLUMNS])
@multiplied
def test_the_longest_sums_are_exact(backend: str, size: int) -> None:
    """The largest terms that exist: fp32 would round their sums, and up to 131071 of them int32 does not overflow."""
    x, codes = torch.full((2, size), -128, dtype=torch.int8), torch.full((3, size), -128, dtype=torch.int8)
    x[1, 0], codes[2, -1] = 127, 127
    found = public("matmul_w8a8", backend)(x, torch.full((2,), 2.0**-14), kernels.pack_int8(codes), torch.ones(3))
    assert_equal(found, ((x.long() @ codes.long().T).float() * 2.0**-14))


@multiplied
def test_a_row_is_the_same_whatever_the_others(backend: str) -> None:
    """Bit for bit, in any place, among any number of rows: sums are exact."""
    x, x_scales, codes, scales = drawn(150, 70, 1100, torch.bfloat16)
    weight, bias = (kernels.pack_int8(codes), scales), torch.randn(70).bfloat16()
    run = public("matmul_w8a8", backend)
    whole = run(x, x_scales, *weight, bias)
    for rows in (1, 15, 16, 17, 33, 64, 65, 129):
        for some in (slice(0, rows), slice(150 - rows, 150)):
            assert_equal(run(x[some], x_scales[some], *weight, bias), whole[some])


@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 200), st.integers(0, 2**32))
def test_any_shape(rows: int, features: int, size: int, seed: int) -> None:
    """The CPU's matmul is the reference's, whose sums are exact in fp64."""
    torch.manual_seed(seed)
    x, x_scales, codes, scales = drawn(rows, features, size, torch.float32)
    x_scales, scales = torch.ones_like(x_scales), torch.ones_like(scales)
    for backend in on_cpu("matmul_w8a8"):
        found = public("matmul_w8a8", backend)(x, x_scales, kernels.pack_int8(codes), scales)
        assert_equal(found, (x.long() @ codes.long().T).float())


@given(devices, sizes, sizes, sizes)
def test_any_launch(device: Device, rows: int, features: int, size: int) -> None:
    """Splits have four tiles of K at least, and no more tiles are in flight than fit."""
    launch = heuristics.w8a8_heuristic(device, rows=rows, features=features, size=size)
    assert_legal(device, launch)
    assert launch.splits == 1 or size // launch.splits >= 512
    assert launch.stages == 1 or launch.stages * (128 + launch.rows) * launch.columns <= device.shared_memory


@pytest.mark.parametrize("rows", [3, 70])
@multiplied
def test_nothing_past_the_end_is_read_or_written(backend: str, rows: int) -> None:
    """Slices of wider buffers: other values beside x and after the tiles, huge values beside scales and bias."""
    x, x_scales, codes, scales = drawn(rows, 70, 96, torch.bfloat16)
    packed, bias = kernels.pack_int8(codes), torch.randn(70).bfloat16()
    wide_x = torch.randint(-128, 128, (rows + 2, 160), dtype=torch.int8)
    wide_x[1:-1, 32:128] = x
    wide_scales, wide_bias = noise_(torch.empty(72, dtype=torch.bfloat16)), noise_(torch.empty(90).bfloat16())
    wide_scales[1:-1], wide_bias[8:78] = scales, bias
    wide_packed = torch.randint(-128, 128, (3, 3, 4, 128, 16), dtype=torch.int8)
    wide_packed[:2, :1] = packed
    buffer = torch.full((rows + 2, 90), 7.0, dtype=torch.bfloat16)
    out = buffer[1:-1, 8:78]
    taken = (wide_x[1:-1, 32:128], x_scales, wide_packed[:2, :1], wide_scales[1:-1], wide_bias[8:78])
    assert public("matmul_w8a8", backend)(*taken, out=out) is out
    assert_equal(out.contiguous(), check(backend, x, x_scales, codes, scales, bias))
    buffer[1:-1, 8:78] = 7.0
    assert (buffer == 7.0).all()


@rounded
def test_rows_of_a_wider_buffer(backend: str) -> None:
    wide = noise_(torch.empty(6, 100, dtype=torch.bfloat16))
    wide[1:-1, 8:78] = torch.randn(4, 70).bfloat16()
    some = wide[1:-1, 8:78]
    codes, scales = torch.empty(4, 70, dtype=torch.int8), torch.empty(4)
    found = public("quantize_rows", backend)(some, out=codes, scales_out=scales)
    assert found[0] is codes
    assert found[1] is scales
    assert_equal(codes, reference.quantize_rows(some)[0])


@pytest.mark.parametrize("leading", [(), (2, 3), (2, 0), (2, 40)])
@multiplied
def test_any_number_of_leading_dimensions(backend: str, leading: tuple[int, ...]) -> None:
    _, _, codes, scales = drawn(1, 5, 64, torch.float16)
    x, x_scales = kernels.quantize_rows(torch.randn(*leading, 64))
    run, packed = public("matmul_w8a8", backend), kernels.pack_int8(codes)
    found = run(x, x_scales, packed, scales)
    assert_equal(found, run(x.view(-1, 64), x_scales.view(-1), packed, scales).view(*leading, 5))


def arguments() -> dict[str, Tensor]:
    x, x_scales, codes, scales = drawn(2, 70, 192, torch.float16)
    return {"x": x, "x_scales": x_scales, "packed": kernels.pack_int8(codes), "scales": scales}


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        (
            "x",
            torch.zeros(2, 0).char(),
            ValueError,
            r"^x has shape \[2, 0\]; legal: \[..., K\] with K from 1 to 131071$",
        ),
        ("x", torch.zeros(1, 1 << 17).char(), ValueError, r"^x has shape \[1, 131072\]; legal: .* 1 to 131071$"),
        ("x", torch.zeros(2, 192), TypeError, "^x has dtype torch.float32; legal: torch.int8$"),
        ("x_scales", torch.zeros(3), ValueError, r"^x_scales has shape \[3\]; legal: \[2\]$"),
        ("x_scales", torch.zeros(2).half(), TypeError, "^x_scales has dtype torch.float16; legal: "),
        (
            "packed",
            torch.zeros(2, 1, 4, 128, 16).char(),
            ValueError,
            r"^packed has shape .*; legal: \[2, 2, 4, 128, 16",
        ),
        ("scales", torch.zeros(70, 1), ValueError, r"^scales has shape \[70, 1\]; legal: \[N\]$"),
        ("scales", torch.zeros(70).int(), TypeError, "^out has dtype torch.int32; legal: torch.bfloat16"),
        (
            "bias",
            torch.zeros(70).bfloat16(),
            TypeError,
            "^bias has dtype torch.bfloat16; legal: torch.float16, torch.float32$",
        ),
        ("out", torch.zeros(2, 70), TypeError, "^scales has dtype torch.float16; legal: torch.float32$"),
        ("out", torch.zeros(2, 64).half(), ValueError, r"^out has shape \[2, 64\]; legal: \[2, 70\]$"),
        ("workspace", torch.zeros(9), TypeError, "^workspace has dtype torch.float32; legal: torch.int32$"),
    ],
)
def test_what_is_refused(name: str, value: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kernels.matmul_w8a8(**arguments() | {name: value})


def test_what_cannot_be_rounded() -> None:
    for shape in ((2, 0), ()):
        x = torch.zeros(shape)
        with pytest.raises(
            ValueError, match=rf"^x has shape {re.escape(str([*shape]))}; legal: \[..., K\] with K >= 1$"
        ):
            kernels.quantize_rows(x, out=x.char(), scales_out=torch.zeros(shape[:-1]))
    with pytest.raises(TypeError, match=r"^x has dtype torch.int8"):
        kernels.quantize_rows(torch.zeros(2, 3).char())
    with pytest.raises(ValueError, match=r"^out has shape \[2, 4\]; legal: \[2, 3\]$"):
        kernels.quantize_rows(torch.zeros(2, 3), out=torch.zeros(2, 4).char())
    with pytest.raises(TypeError, match=r"^scales_out has dtype torch.float16; legal: torch.float64, torch.float32$"):
        kernels.quantize_rows(torch.zeros(2, 3), scales_out=torch.zeros(2).half())


def test_no_scratch_memory_on_a_cpu() -> None:
    given = arguments()
    assert kernels.matmul_w8a8_workspace(given["x"], given["packed"], given["scales"]).shape == (0,)
