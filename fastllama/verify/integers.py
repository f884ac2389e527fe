"""Cases of rows rounded to 8-bit codes, and of products of codes by codes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllama.kernels import pack_int8
from fastllama.verify import oracle
from fastllama.verify.case import EPS, Case, Random, Results

ROWS = ((1, 4096), (33, 256), (7, 100))


def _codes(x: Tensor) -> Results:
    scales = x.abs().amax(-1, keepdim=True) / 127
    return (x / scales).round(), scales.squeeze(-1)


def _values(results: Results) -> Results:
    """What codes and scales stand for, and whatever else there is."""
    codes, scales, *others = results
    return codes * scales[..., None], *others


def quantize_rows(random: Random) -> Iterator[Case]:
    for shape in ROWS:
        yield Case("quantize_rows", f"x {list(shape)}", (random.normal(*shape),), _codes, view=_values)


def matmul_w8a8(random: Random) -> Iterator[Case]:
    def formula(x: Tensor, x_scales: Tensor, packed: Tensor, scales: Tensor, bias: Tensor, codes: Tensor) -> Results:
        left = (x * x_scales[..., None]).to(scales.dtype)
        return (F.linear(left, codes.to(scales.dtype) * scales[:, None], bias),)

    for tokens, inner, outer in ((1, 4096, 96), (33, 1024, 130), (70, 200, 65)):
        x, codes = (
            (random.order(rows * inner).view(rows, inner) % 255 - 127).to(torch.int8) for rows in (tokens, outer)
        )
        x_scales, scales = (
            (random.normal(tokens).abs().float() + 1) / 64,
            random.normal(outer) / (64 * math.sqrt(inner)),
        )
        args = (x, x_scales, pack_int8(codes), scales, random.normal(outer))
        label = f"x [{tokens}, {inner}], weight [{outer}, {inner}]"
        yield Case("matmul_w8a8", label, args, formula, known={"codes": codes})


def rms_norm_int8(random: Random) -> Iterator[Case]:
    def formula(x: Tensor, weight: Tensor, eps: float) -> Results:
        return _codes(oracle.rms_norm(x, weight, eps))

    for shape in ROWS:
        args = (random.normal(*shape), random.normal(shape[-1]), EPS)
        yield Case("rms_norm_int8", f"x {list(shape)}", args, formula, view=_values)


def add_rms_norm_int8(random: Random) -> Iterator[Case]:
    def formula(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Results:
        total = x + residual
        return *_codes(oracle.rms_norm(total, weight, eps)), total

    for shape in ROWS:
        args = (random.normal(*shape), random.normal(*shape), random.normal(shape[-1]), EPS)
        yield Case("add_rms_norm_int8", f"x {list(shape)}", args, formula, view=_values, written=(1,))


def silu_mul_int8(random: Random) -> Iterator[Case]:
    def formula(gate_up: Tensor) -> Results:
        gate, up = gate_up.chunk(2, -1)
        return _codes(F.silu(gate) * up)

    for shape in ROWS:
        yield Case("silu_mul_int8", f"gate_up {list(shape)}", (random.normal(*shape),), formula, view=_values)
