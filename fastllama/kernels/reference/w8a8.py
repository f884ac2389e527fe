"""W8A8 matmul: rows of x quantized dynamically, an int8 weight with one scale for each row."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllama.kernels.reference.int8 import unpack_int8
from fastllama.kernels.reference.norm import add_rms_norm, rms_norm
from fastllama.kernels.reference.numerics import wide
from fastllama.kernels.reference.quantize import quantize_heads
from fastllama.kernels.reference.swiglu import silu_mul

MOST_COLUMNS = (1 << 17) - 1  # each term is at most 2^14, so that sums stay below 2^31


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] as (values int8 [..., K], scales [...]), x = values * scales up to rounding, absmax 127.

    Rounded to nearest even. A row that holds an infinity or a NaN becomes zeros with an infinite or NaN scale.
    """
    return quantize_heads(wide(x), torch.int8)


def rms_norm_int8(x: Tensor, weight: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """The norm, rounded to x's dtype, quantized to (values, scales)."""
    return quantize_rows(rms_norm(x, weight, eps))


def add_rms_norm_int8(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """The norm of x + residual, quantized to (values, scales); residual becomes that sum."""
    normed, total = add_rms_norm(x, residual, weight, eps)
    residual.copy_(total)
    return quantize_rows(normed)


def silu_mul_int8(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """silu(gate) * up, rounded to gate_up's dtype, quantized to (values, scales)."""
    return quantize_rows(silu_mul(gate_up))


def matmul_w8a8(x: Tensor, x_scales: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """(x @ q^T) * x_scales * scales (+ bias) for the weight's values q, sums of integers exact, in scales' dtype."""
    codes = unpack_int8(packed, scales.shape[0], x.shape[-1])
    sums = x.double() @ codes.double().T  # integers under 2^53
    y = sums.to(x_scales.dtype) * x_scales[..., None] * scales.to(x_scales.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(scales.dtype)
