"""Quantized keys and values: 8-bit codes with one fp32 scale for each token and head."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGEST_CODE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
SMALLEST_ABSMAX = 2.0**-100  # smaller ones count as this, so that every scale has a finite reciprocal


def quantize_heads(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [..., D] as (codes [..., D], scales [...]): x is about codes * scales, absmax the largest code.

    Codes are rounded to nearest even. A head that holds an infinity or a NaN gets codes 0 and a scale of that kind, so
    that it comes back as NaN and disturbs no other.
    """
    absmax = x.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_ABSMAX)
    largest = torch.full_like(absmax, LARGEST_CODE[dtype])  # not a number: torch rounds that quotient twice
    scaled = torch.where(absmax < math.inf, x * (largest / absmax), 0.0)
    codes = scaled.round() if dtype == torch.int8 else scaled
    return codes.to(dtype), (absmax / largest).squeeze(-1)


def quantize_by(scale: float, x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as codes under one scale that is given: x is about codes * scale, as far as the largest code reaches.

    Codes are the quotients rounded to nearest even; larger ones are the largest code. NaN is fp8's NaN, and code 0 of
    int8, which has none.
    """
    largest = LARGEST_CODE[dtype]
    quotient = x / torch.full((), scale, dtype=x.dtype, device=x.device)  # no number: CUDA would multiply by 1 / scale
    codes = quotient.clamp(-largest, largest)
    return (codes.round().nan_to_num(0.0) if dtype == torch.int8 else codes).to(dtype)


def dequantize_heads(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """codes [..., D] * scales [...], in fp32, or in fp64 where `dtype` is that."""
    real = torch.float64 if dtype == torch.float64 else torch.float32
    return codes.to(real) * scales[..., None].to(real)
