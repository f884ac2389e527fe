"""bf16 weights packed in 12 bits: lossless, and matmuls as exact as with the plain weight."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor

from fastllama import kernels
from fastllama.kernels import reference
from fastllama.kernels.dispatch.op import OPS
from fastllama.kernels.numba import bf12 as numba_bf12
from tests.kernels.honest import DTYPES, assert_equal, assert_honest, on_cpu, public

PACKERS = [reference.pack_bf12, numba_bf12.pack_bf12]
packers = pytest.mark.parametrize("pack", PACKERS, ids=["reference", "numba"])
biased = pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
# rows, K, N: one block, odd rows and features, either side of where the implementation changes its ways, nothing
SHAPES = [(1, 64, 1), (1, 192, 35), (2, 64, 1), (3, 128, 7), (32, 64, 18), (33, 64, 17), (40, 64, 1030), (0, 64, 4)]


def bits(weight: Tensor) -> Tensor:
    return weight.view(torch.int16)


def weight_of(features: int, size: int) -> Tensor:
    """Normal values with neighbours far above and below them, of both signs, first and last in rows, and zeros."""
    weight = (torch.randn(features, size) / math.sqrt(size)).bfloat16()
    flat = weight.view(-1)
    flat[:: size // 2 + 1] *= 256
    flat[1 :: size // 3 + 1] *= 2.0**-30
    flat[2::51] = 0
    flat[-1] = -3.0e4
    return weight


@packers
def test_every_bf16_number_comes_back(pack: object) -> None:
    """All of them: zeros of both signs, subnormals, infinities and NaN among them."""
    assert callable(pack)
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).view(512, 128)
    assert_equal(bits(kernels.unpack_bf12(*pack(every))), bits(every))


@packers
@pytest.mark.parametrize("size", [64, 128, 448])
@pytest.mark.parametrize("features", [1, 3, 600])
def test_weights_come_back(pack: object, features: int, size: int) -> None:
    assert callable(pack)
    weight = weight_of(features, size)
    codes, outliers, exponent = pack(weight)
    assert codes.shape == (features, size * 3 // 2)
    assert 0 < len(outliers) < weight.numel() / 8
    assert_equal(bits(kernels.unpack_bf12(codes, outliers, exponent)), bits(weight))


@given(st.lists(st.integers(0, 2**16 - 1), min_size=64, max_size=64), st.integers(0, 255))
def test_both_packers_agree_on_any_bits(words: list[int], middle: int) -> None:
    weight = torch.tensor(words, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(1, 64)
    weight[0, ::3] = torch.tensor(middle << 7).to(torch.int16).view(torch.bfloat16)
    (codes, outliers, exponent), theirs = (pack(weight) for pack in PACKERS)
    assert_equal(codes, theirs[0])
    assert_equal(outliers, theirs[1])
    assert exponent == theirs[2]
    assert_equal(bits(kernels.unpack_bf12(codes, outliers, exponent)), bits(weight))


def test_the_layout_is_the_documented_one() -> None:
    """Weight 16 a + 8 b + 4 c + d of 32 at 16 c + 8 a + 2 d + b: one weight that is not zero at a time."""
    for k in range(64):
        weight = torch.zeros(1, 64, dtype=torch.bfloat16)
        weight[0, k] = -1.5
        codes, outliers, exponent = kernels.pack_bf12(weight)
        assert outliers.shape == (0, 3)
        code = 127 - exponent + 1
        half, i = divmod(k, 32)
        at = 16 * (i // 4 % 2) + 8 * (i // 16) + 2 * (i % 4) + i // 8 % 2
        expected = torch.zeros(96, dtype=torch.uint8)
        expected[32 * half + at] = (code & 1) << 7 | 0x40
        expected[64 + at] = 8 | code >> 1 << 4 if half else 0x80 | code >> 1
        assert_equal(codes[0], expected)


def test_normal_weights_have_few_outliers() -> None:
    weight = (torch.randn(512, 4096) * 0.02).bfloat16()
    codes, outliers, _ = kernels.pack_bf12(weight)
    assert codes.nbytes + outliers.nbytes < 0.752 * weight.nbytes


@biased
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", on_cpu("matmul_bf12"))
def test_matmul_bf12(backend: str, dtype: torch.dtype, shape: tuple[int, int, int], biased: bool) -> None:
    rows, size, features = shape
    weight, x = weight_of(features, size), torch.randn(rows, size).to(dtype)
    bias = torch.randn(features).to(dtype) if biased else None
    found = public("matmul_bf12", backend)(x, *kernels.pack_bf12(weight), bias)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert_honest(found, F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(dtype), exact)


@pytest.mark.parametrize("power", [-120, -100, -40, 40, 100, 120])
@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("backend", on_cpu("matmul_bf12"))
def test_sizes_of_x_do_not_matter(backend: str, rows: int, power: int) -> None:
    """Decoded weights are as small as 2^-126 before scaling: weight times x may neither underflow nor overflow."""
    weight, x = (torch.randn(5, 64) / 64).bfloat16(), (torch.randn(rows, 64) * 2.0**power).bfloat16()
    found = public("matmul_bf12", backend)(x, *kernels.pack_bf12(weight))
    assert_honest(found, F.linear(x, weight), F.linear(x.double(), weight.double()))


@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("backend", on_cpu("matmul_bf12"))
def test_long_sums_are_kept_in_fp32(backend: str, rows: int) -> None:
    x, weight = torch.ones(rows, 4096).bfloat16(), torch.full((3, 4096), 0.25).bfloat16()
    found = public("matmul_bf12", backend)(x, *kernels.pack_bf12(weight))
    assert_equal(found, torch.full((rows, 3), 1024.0, dtype=torch.bfloat16))


@pytest.mark.parametrize("rows", [1, 6, 40])
@pytest.mark.parametrize("backend", on_cpu("matmul_bf12"))
def test_strided_inputs_and_outputs(backend: str, rows: int) -> None:
    weight, x = weight_of(21, 128), torch.randn(rows, 128)
    codes, outliers, exponent = kernels.pack_bf12(weight)
    wide_x, wide_codes = torch.full((rows, 140), math.nan), torch.full((21, 211), 255, dtype=torch.uint8)
    wide_x[:, 8:136], wide_codes[:, 5:197] = x, codes
    buffer = torch.full((rows, 40), 7.0)
    out = buffer[:, 3:24]
    given = (wide_x[:, 8:136], wide_codes[:, 5:197], outliers, exponent)
    assert public("matmul_bf12", backend)(*given, out=out) is out
    assert_honest(out, F.linear(x, weight.float()), F.linear(x.double(), weight.double()))
    buffer[:, 3:24] = 7.0
    assert (buffer == 7.0).all()


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("backend", on_cpu("matmul_bf12"))
def test_nan_stays_in_its_row(backend: str, rows: int) -> None:
    x, weight = torch.ones(rows, 64), torch.ones(2, 64).bfloat16()
    x[0, 5] = math.nan
    found = public("matmul_bf12", backend)(x, *kernels.pack_bf12(weight))
    assert found[0].isnan().all()
    assert_equal(found[1:], torch.full((rows - 1, 2), 64.0))


def test_it_runs_on_numba_here() -> None:
    """Otherwise the tests above would compare the reference with itself."""
    assert OPS["matmul_bf12"].implementation("cpu").backend == "numba"


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (torch.zeros(3, 65, dtype=torch.bfloat16), ValueError, r"weight has shape \[3, 65\]; legal: .* multiple of 64"),
        (torch.zeros(64, dtype=torch.bfloat16), ValueError, r"weight has shape \[64\]"),
        (torch.zeros(3, 64), TypeError, "weight has dtype torch.float32"),
    ],
)
def test_what_cannot_be_packed(weight: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kernels.pack_bf12(weight)


@pytest.mark.parametrize("exponent", [0, 128])
def test_exponents_out_of_range(exponent: int) -> None:
    codes, outliers, _ = kernels.pack_bf12(torch.ones(2, 64).bfloat16())
    with pytest.raises(ValueError, match=f"exponent .* {exponent}"):
        kernels.matmul_bf12(torch.ones(1, 64), codes, outliers, exponent)


def test_a_size_that_is_no_multiple() -> None:
    codes, outliers, exponent = kernels.pack_bf12(torch.ones(2, 64).bfloat16())
    with pytest.raises(ValueError, match=r"x has shape \[1, 65\]; legal: .* multiple of 64"):
        kernels.matmul_bf12(torch.ones(1, 65), codes, outliers, exponent)


@pytest.mark.parametrize("outlier", [(1, 64), (1, -1), (1, 2**31 - 1), (3, 0), (-1, 0), (2**31 - 1, 5)], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("backend", on_cpu("matmul_bf12"))
def test_outliers_of_no_place(backend: str, rows: int, outlier: tuple[int, int]) -> None:
    """A column past x makes its feature NaN, a row past the weight is ignored; no memory is touched."""
    x, weight = torch.ones(rows, 64), torch.ones(3, 64).bfloat16()
    codes, outliers, exponent = kernels.pack_bf12(weight)
    bits = torch.tensor([[*outlier, torch.tensor(7.0).view(torch.int32).item()]], dtype=torch.int32)
    outliers = torch.cat((outliers, bits))
    expected = torch.full((rows, 3), 64.0)
    if outlier[0] == 1:
        expected[:, 1] = math.nan
    assert_equal(public("matmul_bf12", backend)(x, codes, outliers, exponent), expected)


@packers
@pytest.mark.parametrize("shape", [(0, 64), (0, 0), (3, 0)], ids=str)
def test_weights_without_elements(pack: object, shape: tuple[int, int]) -> None:
    assert callable(pack)
    packed = pack(torch.empty(shape).bfloat16())
    assert kernels.unpack_bf12(*packed).shape == shape
    for backend in on_cpu("matmul_bf12"):
        assert_equal(public("matmul_bf12", backend)(torch.ones(2, shape[1]), *packed), torch.zeros(2, shape[0]))
