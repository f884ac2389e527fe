"""Cases of activations rounded to 8 bits, and of their matmuls with 8-bit weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllama.catalogue import matmuls, rows
from fastllama.catalogue.maker import Maker
from fastllama.verify import oracle
from fastllama.verify.case import FormulaCase, Results, given

ROWS = ((1, 4096), (33, 256), (7, 100))


def _rounded(x: Tensor) -> Results:
    scales = x.abs().amax(-1, keepdim=True) / 127
    return (x / scales).round(), scales.squeeze(-1)


def _values(results: Results) -> Results:
    """Dequantized integers and scales, followed by further outputs."""
    integers, scales, *others = results
    return integers * scales[..., None], *others


def quantize_rows(m: Maker) -> Iterator[FormulaCase]:
    for shape in ROWS:
        call = rows.quantize_rows(m, *shape)
        yield FormulaCase("quantize_rows", f"x {list(shape)}", given("quantize_rows", call), _rounded, view=_values)


def matmul_w8a8(m: Maker) -> Iterator[FormulaCase]:
    def formula(x: Tensor, x_scales: Tensor, scales: Tensor, bias: Tensor, integers: Tensor, **_: Any) -> Results:
        left = (x * x_scales[..., None]).to(scales.dtype)
        return (F.linear(left, integers.to(scales.dtype) * scales[:, None], bias),)

    for tokens, inner, outer in ((1, 4096, 96), (33, 1024, 130), (70, 200, 65)):
        x, integers = (
            (m.some_of(count * inner, count * inner).view(count, inner) % 255 - 127).to(torch.int8)
            for count in (tokens, outer)
        )
        call = matmuls.matmul_w8a8(m, tokens, outer, inner, form="bias", x=x, integers=integers)
        label, known = f"x [{tokens}, {inner}], weight [{outer}, {inner}]", {"integers": integers}
        yield FormulaCase("matmul_w8a8", label, given("matmul_w8a8", call), formula, known=known)


def rms_norm_int8(m: Maker) -> Iterator[FormulaCase]:
    def formula(x: Tensor, weight: Tensor, eps: float) -> Results:
        return _rounded(oracle.rms_norm(x, weight, eps))

    for shape in ROWS:
        call = rows.rms_norm_int8(m, *shape)
        yield FormulaCase("rms_norm_int8", f"x {list(shape)}", given("rms_norm_int8", call), formula, view=_values)


def add_rms_norm_int8(m: Maker) -> Iterator[FormulaCase]:
    def formula(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Results:
        total = x + residual
        return *_rounded(oracle.rms_norm(total, weight, eps)), total

    for shape in ROWS:
        call = given("add_rms_norm_int8", rows.add_rms_norm_int8(m, *shape))
        yield FormulaCase("add_rms_norm_int8", f"x {list(shape)}", call, formula, view=_values, written=("residual",))


def silu_mul_int8(m: Maker) -> Iterator[FormulaCase]:
    def formula(gate_up: Tensor) -> Results:
        gate, up = gate_up.chunk(2, -1)
        return _rounded(F.silu(gate) * up)

    for count, size in ROWS:
        call = given("silu_mul_int8", rows.silu_mul_int8(m, count, size // 2))
        yield FormulaCase("silu_mul_int8", f"gate_up {[count, size]}", call, formula, view=_values)
