"""Quantized keys and values: int8 or fp8 with one fp32 scale for each token and head."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGEST_CODE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
SMALLEST_ABSMAX = 2.0**-100  # smaller magnitudes count as this, so that every scale has a finite reciprocal


def quantize_heads(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [..., D] as (values [..., D], scales [...]), x = values * scales up to rounding; absmax quantization.

    Rounded to nearest even. A head that holds an infinity or a NaN becomes zeros with an infinite or NaN scale, so that
    it is read back as NaN and no other head is affected.
    """
    absmax = x.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_ABSMAX)
    largest = torch.full_like(absmax, LARGEST_CODE[dtype])  # a tensor: torch rounds number / tensor twice
    scaled = torch.where(absmax < math.inf, x * (largest / absmax), 0.0)
    codes = scaled.round() if dtype == torch.int8 else scaled
    return codes.to(dtype), (absmax / largest).squeeze(-1)


def quantize_by(scale: float, x: Tensor, dtype: torch.dtype) -> Tensor:
    """x / scale for one given scale, clamped to the range of a quantized dtype.

    Rounded to nearest even. NaN stays NaN in fp8 and becomes 0 in int8.
    """
    largest = LARGEST_CODE[dtype]
    # Divided by a tensor: for a number, CUDA would multiply by 1 / scale.
    quotient = x / torch.full((), scale, dtype=x.dtype, device=x.device)
    codes = quotient.clamp(-largest, largest)
    return (codes.round().nan_to_num(0.0) if dtype == torch.int8 else codes).to(dtype)


def dequantize_heads(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Quantized values [..., D] * scales [...], in fp32, or in fp64 if `dtype` is fp64."""
    real = torch.float64 if dtype == torch.float64 else torch.float32
    return codes.to(real) * scales[..., None].to(real)
