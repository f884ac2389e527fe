"""bf16, fp8 and fused multiply-adds in NumPy, against torch and exact fractions."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch

from fastllama.testing import floats

F32_SPECIALS = [0.0, -0.0, 1e-45, -1e-45, 1e-40, 3e38, 3.4e38, -3.4e38, float("inf"), float("-inf"), float("nan")]


def float32_values() -> np.ndarray:
    """Every bf16 value, its neighbours in float32, both sides of every middle between two, and special values."""
    bits = np.arange(1 << 16, dtype=np.uint32) << 16
    around = np.concatenate([bits + np.uint32(step) for step in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    return np.concatenate([around.view(np.float32), np.array(F32_SPECIALS, np.float32)])


def assert_same(found: np.ndarray, expected: np.ndarray, isnan: np.ndarray) -> None:
    assert found.dtype == expected.dtype
    assert (found == expected)[~isnan].all()


def test_bf16_rounds_as_torch_does() -> None:
    values = float32_values()
    expected = torch.from_numpy(values).bfloat16()
    nan = np.isnan(values)
    assert_same(floats.narrow(values, "bf16"), expected.view(torch.uint16).numpy(), nan)
    assert np.isnan(floats.widen(floats.narrow(values[nan], "bf16"), "bf16")).all()


def test_bf16_widens_as_torch_does() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    expected = torch.from_numpy(bits).view(torch.bfloat16).float().numpy()
    assert_same(floats.widen(bits, "bf16"), expected, np.isnan(expected))


@pytest.mark.parametrize("name", floats.FP8)
def test_fp8_widens_as_torch_does(name: str) -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    expected = bits.view(floats.FP8[name]).float().numpy()
    found = floats.widen(bits.numpy(), name)
    assert_same(found, expected, np.isnan(expected))
    assert (np.isnan(found) == np.isnan(expected)).all()


@pytest.mark.parametrize("name", floats.FP8)
def test_fp8_rounds_as_torch_does_and_saturates(name: str) -> None:
    values = float32_values()
    values = np.concatenate([values, (np.arange(256 * 8, dtype=np.float32) / 8 + 0.0625) * 2])
    largest = torch.finfo(floats.FP8[name]).max
    nan = np.isnan(values)
    expected = torch.from_numpy(np.clip(values, -largest, largest)).to(floats.FP8[name])
    assert_same(floats.narrow(values, name), expected.view(torch.uint8).numpy(), nan)
    assert np.isnan(floats.widen(floats.narrow(values[nan], name), name)).all()


def rounded(value: Fraction, mantissa: int) -> Fraction:
    """To nearest even with `mantissa` significant bits, the exponent unbounded."""
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    exponent -= abs(value) < Fraction(2) ** exponent
    unit = Fraction(2) ** (exponent - mantissa + 1)
    return round(value / unit) * unit


def triples(mantissa: int) -> Iterator[tuple[float, float, float]]:
    """Operands of a * b + c near a tie between two results, decided by a bit far below, and random ones."""
    ulp, random = 2.0 ** (1 - mantissa), np.random.default_rng(0)
    for sign in (1.0, -1.0):
        for tiny in (2.0**-20, 2.0**-40, 2.0**-60):
            yield 1.0, ulp / 2, sign  # a tie
            yield sign * tiny, tiny, 1.0
            yield ulp / 2, 1 + ulp, sign
            yield 1 + ulp, 1 + ulp, sign * tiny * tiny
            yield 1.5 + ulp, 1 - ulp / 2, -sign * tiny
            yield 3.0, 1 + ulp, sign * tiny
    for x, y, z in random.integers(-(1 << (mantissa - 1)), 1 << (mantissa - 1), (100, 3)).tolist():
        yield float(x), float(y), float(z) * 2.0 ** int(random.integers(-70, 40))


def exactly(x: float, y: float, z: float) -> Fraction:
    return Fraction(x) * Fraction(y) + Fraction(z)


@pytest.mark.parametrize(("name", "mantissa"), [("bf16", 8), ("fp32", 24)])
def test_fma_rounds_once(name: str, mantissa: int) -> None:
    cases = list(triples(mantissa))
    operands = np.array(cases, np.float32).T
    if name == "bf16":
        found = floats.widen(floats.fma_bf16(*operands), "bf16")
    else:
        found = floats.fma(*operands).astype(np.float32)
    assert [Fraction(float(value)) for value in found] == [rounded(exactly(*case), mantissa) for case in cases]


def test_fma_rounds_once_in_fp16() -> None:
    """Where neither the operands nor the result are subnormal or too large."""
    limits = torch.finfo(torch.float16)
    with np.errstate(over="ignore"):
        cases = [case for case in triples(11) if np.float16(case).tolist() == list(case)]
    cases = [case for case in cases if limits.tiny <= abs(exactly(*case)) <= limits.max]
    assert len(cases) > 20
    found = floats.fma(*np.array(cases, np.float32).T).astype(np.float16)
    assert [Fraction(float(value)) for value in found] == [rounded(exactly(*case), 11) for case in cases]


def test_fma_of_infinities_and_nan() -> None:
    x = np.array([np.inf, np.inf, 0.0, 1.0, 3e38, np.nan], np.float32)
    y = np.array([1.0, 1.0, np.inf, 1.0, 3e38, 1.0], np.float32)
    z = np.array([1.0, -np.inf, 1.0, np.inf, 0.0, 1.0], np.float32)
    expected = np.array([np.inf, np.nan, np.nan, np.inf, np.inf, np.nan], np.float32)
    with np.errstate(all="ignore"):
        single = floats.fma(x, y, z).astype(np.float32)
        half = floats.widen(floats.fma_bf16(x, y, z), "bf16")
    np.testing.assert_array_equal(single, expected)
    np.testing.assert_array_equal(half, expected)
