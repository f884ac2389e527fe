"""Errors that are legal beyond the rule: where fp32 overflows, underflows or cancels in an intermediate."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastllama.kernels import reference
from tests.kernels.fuzz.calls import Arguments

FP32 = torch.finfo(torch.float32).eps


def has_denormals(x: Tensor) -> bool:
    return bool(((x != 0) & (x.double().abs() < torch.finfo(torch.float32).smallest_normal)).any())


def magnitudes(op: str, given: Arguments) -> tuple[Tensor, Tensor]:
    """|x| [..., K] and |weight| [N, K] of a matmul in fp64, at least, with 0 for what is not finite."""
    x = given["x"].double().abs()
    if given.get("norm") is not None:
        norm = given["norm"].double()
        x = torch.maximum(reference.rms_norm(x, norm, given["eps"]).abs(), x * norm.abs())
    if op == "matmul":
        weight = given["weight"].double().abs()
    elif op == "matmul_bf12":
        weight = reference.unpack_bf12(given["codes"], given["outliers"], given["exponent"]).double().abs()
    else:
        scales = given["scales"].double().abs()
        scales = scales[:, None] if scales.dim() == 1 else scales
        codes = 32 if op == "matmul_int4" else 128
        weight = (codes * scales).repeat_interleave(x.shape[-1] // max(scales.shape[1], 1), 1)
    return x.nan_to_num(0.0, 0.0), weight.nan_to_num(0.0, 0.0)


def least_weights(given: Arguments) -> float:
    """Of 64 keys, by the largest value: Triton's kernels round a weight to v's dtype, Numba's end at e^-87."""
    values = _held(given, "v")
    limits = torch.finfo(given["q"].dtype)
    return (
        64 * float(values.abs().max()) * max(limits.smallest_normal * limits.eps, 2.0**-125) if values.numel() else 0.0
    )


def _held(given: Arguments, side: str) -> Tensor:
    """Keys or values as stored, or times their scales where that is larger; 0 for what is not finite."""
    held, scales = (
        given.get(side, given.get(f"{side}_pages")).double().nan_to_num(0.0, 0.0, 0.0),
        given.get(f"{side}_scales"),
    )
    held = held if scales is None else held * scales.double().nan_to_num(0.0, 0.0)[..., None]
    return held * max(given.get(f"{side}_scale") or 1.0, 1.0)


def scores_overflow(given: Arguments) -> Tensor:
    """Where a query's scores may overflow in one order of multiplying and not in another: [T, H, 1]."""
    q, keys = given["q"].double().abs().nan_to_num(0.0, 0.0), _held(given, "k").abs()
    largest = keys.flatten(0, -2).amax(0) if keys.numel() else keys.new_zeros(keys.shape[-1])
    scores = (q * largest).sum(-1, keepdim=True)
    scale = abs(given["scale"])
    most = torch.maximum(scores * max(1.0, scale), q.amax(-1, keepdim=True) * scale)
    values = _held(given, "v")
    sums = 64 * values.abs().max() if values.numel() else 0.0  # not yet divided by the sum of at most as many weights
    return torch.maximum(most, torch.as_tensor(sums)) >= torch.finfo(torch.float32).max / 32


def sums_overflow(op: str, given: Arguments, shape: torch.Size) -> Tensor | None:
    """Where the magnitudes that a matmul adds reach the largest fp32: what it gives then depends on their order.

    Quantized values are summed before their scales multiply, so x alone may overflow; where a scale or a weight is not
    finite in fp32, the value 0 is NaN in the reference and adds nothing to such a sum.
    """
    if op.startswith("attention"):
        return scores_overflow(given)
    if not op.startswith("matmul"):
        return None
    x, weight = magnitudes(op, given)
    sums = x @ weight.T
    if op in ("matmul_int4", "matmul_int8"):
        sums = torch.maximum(sums, 256 * x.sum(-1, keepdim=True))
        legal = given["scales"].double().abs() * 128 < torch.finfo(torch.float32).max
        sums = sums.masked_fill(~legal.all(1), math.inf)
    if op == "matmul_w8a8":
        sums = sums * given["x_scales"].double().abs()[..., None].nan_to_num(0.0, 0.0)
    if given["bias"] is not None:
        sums = sums + given["bias"].double().abs().nan_to_num(0.0, 0.0)
    loose = sums >= torch.finfo(torch.float32).max / 4
    if given.get("gated"):
        first, second = loose.chunk(2, -1)
        loose = first | second
    return loose.expand(shape)


def fixed_point(op: str, given: Arguments) -> Tensor:
    """Twice the error of x in units of its fixed point, times the weights that it meets: [..., N]."""
    x, scales = given["x"], given["scales"].double()
    if given["norm"] is not None:
        x = reference.rms_norm(x, given["norm"], given["eps"])
    if not x.numel():
        return torch.zeros(())
    largest = x.double().abs().where(x.isfinite(), 0.0).amax(-1, keepdim=True)
    unit = torch.clamp(largest * 2.0 ** (-28 if x.dtype == torch.float32 else -13), min=2.0**-125)
    codes = 16 if op == "matmul_int4" else 128
    size = codes * x.shape[-1] / max(scales.shape[1], 1) * scales.abs().where(scales.isfinite(), 0.0).sum(1)
    made = unit * size + 2.0**-121  # the units times a scale may be denormal, and sums have 27 bits
    if not made.numel():
        return torch.zeros(())
    if op == "matmul_int4":  # values less 8, and zeros less 8 by sums of x: these cancel
        x, weight = magnitudes(op, given)
        made = made + 4 * FP32 * (x @ weight.T)
    return made.amax(-1, keepdim=True) * (math.inf if given["gated"] else 1.0)  # it is multiplied by the other half
