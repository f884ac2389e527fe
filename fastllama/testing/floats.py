"""bf16 and fp8 for NumPy: bits to float32 and back, rounded once to nearest even."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]

FP8 = {
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
    "fp8e4b8": torch.float8_e4m3fnuz,
    "fp8e5b16": torch.float8_e5m2fnuz,
}
NAMES = ("bf16", *FP8)


def _values(dtype: torch.dtype) -> Array:
    values: Array = torch.arange(256, dtype=torch.uint8, device="cpu").view(dtype).float().numpy()
    return values


_FP8_VALUES = {name: _values(dtype) for name, dtype in FP8.items()}
# The finite values that are not negative: in every format they have the lowest bit patterns, in rising order.
_FP8_FINITE = {name: values[: int(np.argmin(np.isfinite(values)))] for name, values in _FP8_VALUES.items()}


def widen(bits: Array, name: str) -> Array:
    """The float32 values of the bits of a format in NAMES (uint16 for bf16, uint8 for fp8)."""
    if name == "bf16":
        values: Array = np.left_shift(bits, 16, dtype=np.uint32).view(np.float32)
        return values
    return _FP8_VALUES[name][bits]


def narrow(values: Array, name: str) -> Array:
    """The bits of float values in a format in NAMES; fp8 saturates, as the GPU's conversion does (PTX `satfinite`)."""
    return _bf16(values) if name == "bf16" else _fp8(values, name)


def _bf16(values: Array) -> Array:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def _fp8(values: Array, name: str) -> Array:
    finite = _FP8_FINITE[name]
    middles = (finite[1:] + finite[:-1]) / 2  # exact: one bit more than the format has
    size = np.abs(values)
    code = np.searchsorted(middles, size, side="left")
    tie = size == middles[np.minimum(code, len(middles) - 1)]
    code += tie & (code % 2 == 1)
    unsigned_zero = name.endswith(("b8", "b16"))  # in these formats the sign bit alone is the only NaN
    negative = np.signbit(values) & ((code > 0) | (not unsigned_zero))
    nan = 0x80 if unsigned_zero else 0x7F
    return np.where(np.isnan(values), nan, code + 0x80 * negative).astype(np.uint8)


def fma(x: Array, y: Array, z: Array) -> Array:
    """x * y + z in float64, rounded to odd: rounding it again to float32 or less gives the fused result.

    x, y, z: values of at most 24 significant bits. Source: Boldo and Melquiond, Emulation of FMA and correctly rounded
    sums: proved algorithms using rounding to odd (2008).
    """
    product = np.asarray(np.multiply(x, y, dtype=np.float64))  # exact
    total = np.asarray(np.add(product, z, dtype=np.float64))
    back = total - product
    lost = (product - (total - back)) + (z - back)  # exact (Knuth's two-sum), NaN where the total is not finite
    even = (total.view(np.int64) & 1) == 0
    return np.where(even & (np.abs(lost) > 0), np.nextafter(total, np.copysign(np.inf, lost)), total)


def fma_bf16(x: Array, y: Array, z: Array) -> Array:
    """The bits of x * y + z in bf16, rounded once. x, y, z: float32."""
    total = fma(x, y, z)
    single = total.astype(np.float32)
    # to odd once more: truncate towards zero, then keep a last bit set for whatever was lost
    above = np.abs(single.astype(np.float64)) > np.abs(total)
    single = np.where(above, np.nextafter(single, np.float32(0)), single)
    inexact = np.isfinite(total) & (single.astype(np.float64) != total)
    return _bf16((single.view(np.uint32) | inexact).view(np.float32))
