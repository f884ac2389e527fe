"""Calls of matmuls: every kind of weight, alone and with the prologues and epilogues of a Llama block.

form: fused operations, words of FORMS: adds a bias, normalises x first, gates the result as silu(gate) * up, adds a
residual.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastllama.catalogue.maker import EPS, Arguments, Maker
from fastllama.kernels import (
    matmul_int4_workspace,
    matmul_int8_workspace,
    matmul_w8a8_workspace,
    matmul_workspace,
    pack_bf12,
    pack_int4,
    pack_int8,
)
from fastllama.kernels.reference import int4, int8

FORMS = ("", "bias", "norm", "norm, gated", "residual")
OUTLIERS = 97  # one of this many columns of a 12-bit weight is an outlier, stored in full


def matmul(
    m: Maker, rows: int, features: int, size: int, *, form: str = "", weight: Arguments | None = None
) -> Arguments:
    """weight: an existing result of `matmul_weight`; likewise below."""
    operands = _operands(m, rows, features, size, form)
    call = (weight or matmul_weight(m, features, size)) | operands
    return call | {"workspace": m.workspace(matmul_workspace, rows, call["weight"])}


def matmul_weight(m: Maker, features: int, size: int) -> Arguments:
    return {"weight": m.normal(features, size) / math.sqrt(size)}


def matmul_bf12(
    m: Maker, rows: int, features: int, size: int, *, form: str = "", weight: Arguments | None = None
) -> Arguments:
    operands = _operands(m, rows, features, size, form)
    return (weight or bf12_weight(bf12_values(m, features, size))) | operands


def bf12_values(m: Maker, features: int, size: int) -> Tensor:
    """bf16 values with outliers in every row, so that all results have one scale."""
    values = (m.normal(features, size) / math.sqrt(size)).bfloat16()
    values[:, ::OUTLIERS] *= 256
    return values


def bf12_weight(values: Tensor) -> Arguments:
    return dict(zip(("codes", "outliers", "exponent"), pack_bf12(values), strict=True))


def matmul_int4(
    m: Maker,
    rows: int,
    features: int,
    size: int,
    *,
    group: int = 128,
    zeros: torch.dtype | None = None,
    form: str = "",
    weight: Arguments | None = None,
) -> Arguments:
    """group: columns per scale, at most all columns. zeros: their dtype; symmetric where None."""
    operands = _operands(m, rows, features, size, form)
    call = (weight or int4_weight(m, features, size, group, zeros)) | operands
    return call | {"workspace": m.workspace(matmul_int4_workspace, call["x"], call["packed"], call["scales"])}


def int4_weight(
    m: Maker,
    features: int,
    size: int,
    group: int,
    zeros: torch.dtype | None = None,
    *,
    integers: Tensor | None = None,
    scales: Tensor | None = None,
) -> Arguments:
    """integers: [features, size] uint8, 0 to 15; random, like scales, where None."""
    if m.is_meta:
        packed = m.fresh(*int4.packed_shape(features, size), dtype=torch.int32)
    else:
        packed = pack_int4(m.integers(0, 16, features, size, dtype=torch.uint8) if integers is None else integers)
    scales = m.normal(*groups_of(features, size, group)) / (8 * math.sqrt(size)) if scales is None else scales
    return {"packed": packed, "scales": scales, "zeros": None if zeros is None else int4_zeros(m, scales, zeros)}


def int4_zeros(m: Maker, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Zero points from 0 to 15, one per scale."""
    return (m.normal(*scales.shape).abs().clamp(max=1) * 15).to(dtype)


def groups_of(features: int, size: int, group: int) -> tuple[int, int]:
    """The shape of a weight's scales, with this many columns per group."""
    return features, max(size // group, 1)


def matmul_int8(
    m: Maker,
    rows: int,
    features: int,
    size: int,
    *,
    group: int = 128,
    form: str = "",
    weight: Arguments | None = None,
) -> Arguments:
    """group: as for `matmul_int4`."""
    operands = _operands(m, rows, features, size, form)
    call = (weight or int8_weight(m, features, size, group)) | operands
    return call | {"workspace": m.workspace(matmul_int8_workspace, call["x"], call["packed"], call["scales"])}


def int8_weight(
    m: Maker, features: int, size: int, group: int, *, integers: Tensor | None = None, scales: Tensor | None = None
) -> Arguments:
    """integers: [features, size] int8; random, like scales, where None."""
    packed = _packed_int8(m, features, size, integers)
    scales = m.normal(*groups_of(features, size, group)) / (128 * math.sqrt(size)) if scales is None else scales
    return {"packed": packed, "scales": scales}


def matmul_w8a8(
    m: Maker,
    rows: int,
    features: int,
    size: int,
    *,
    form: str = "",
    x: Tensor | None = None,
    integers: Tensor | None = None,
) -> Arguments:
    """form: "" or "bias". x: [rows, size], -127 to 127, and integers: [features, size], int8; random where None."""
    x = m.integers(-127, 128, rows, size, dtype=torch.int8) if x is None else x
    x_scales = (m.normal(rows).abs().float() + 1) / 64
    scales = m.normal(features) / (64 * math.sqrt(size))
    packed = _packed_int8(m, features, size, integers)
    return {
        "x": x,
        "x_scales": x_scales,
        "packed": packed,
        "scales": scales,
        "bias": m.normal(features) if form == "bias" else None,
        "out": m.fresh(rows, features),
        "workspace": m.workspace(matmul_w8a8_workspace, x, packed, scales),
    }


def _packed_int8(m: Maker, features: int, size: int, integers: Tensor | None) -> Tensor:
    if m.is_meta:
        return m.fresh(*int8.packed_shape(features, size), dtype=torch.int8)
    return pack_int8(m.integers(-128, 128, features, size, dtype=torch.int8) if integers is None else integers)


def _operands(m: Maker, rows: int, features: int, size: int, form: str) -> Arguments:
    """x, the arguments of the fused prologue and epilogue, and the result."""
    words = form.split(", ")
    columns = features // 2 if "gated" in words else features
    return {
        "bias": m.normal(features) if "bias" in words else None,
        "norm": m.normal(size).abs() if "norm" in words else None,
        "eps": EPS,
        "residual": m.normal(rows, columns) if "residual" in words else None,
        "gated": "gated" in words,
        "x": m.normal(rows, size),
        "out": m.fresh(rows, columns),
    }
