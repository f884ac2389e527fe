"""Calls of row-wise ops: norms, SwiGLU, rounding to 8 bits, embedding, merging of attention states."""

from __future__ import annotations

import math

import torch

from fastllama.catalogue.maker import EPS, Arguments, Maker


def rms_norm(m: Maker, rows: int, size: int, *, weight_dtype: torch.dtype | None = None) -> Arguments:
    """weight_dtype: that of x where None."""
    return {
        "x": m.normal(rows, size),
        "weight": m.normal(size, dtype=weight_dtype),
        "eps": EPS,
        "out": m.fresh(rows, size),
    }


def add_rms_norm(m: Maker, rows: int, size: int, *, weight_dtype: torch.dtype | None = None) -> Arguments:
    return {
        "x": m.normal(rows, size),
        "residual": m.normal(rows, size),
        "weight": m.normal(size, dtype=weight_dtype),
        "eps": EPS,
        "out": m.fresh(rows, size),
        "residual_out": m.fresh(rows, size),
    }


def silu_mul(m: Maker, rows: int, size: int, *, apart: bool = False) -> Arguments:
    """size: of the result; the projection has twice as many columns. apart: gate and up are separate tensors."""
    gate_up = m.normal(rows, size if apart else 2 * size)
    return {"gate_up": gate_up, "up": m.normal(rows, size) if apart else None, "out": m.fresh(rows, size)}


def quantize_rows(m: Maker, rows: int, size: int) -> Arguments:
    return {"x": m.normal(rows, size), **_rounded(m, rows, size)}


def rms_norm_int8(m: Maker, rows: int, size: int) -> Arguments:
    return rms_norm(m, rows, size) | _rounded(m, rows, size)


def add_rms_norm_int8(m: Maker, rows: int, size: int) -> Arguments:
    """The residual is updated in place."""
    call = add_rms_norm(m, rows, size) | _rounded(m, rows, size)
    del call["residual_out"]
    return call


def silu_mul_int8(m: Maker, rows: int, size: int) -> Arguments:
    return {"gate_up": m.normal(rows, 2 * size)} | _rounded(m, rows, size)


def _rounded(m: Maker, rows: int, size: int) -> Arguments:
    return {"out": m.fresh(rows, size, dtype=torch.int8), "scales_out": m.fresh(rows, dtype=torch.float32)}


def embedding(m: Maker, rows: int, vocab: int, size: int) -> Arguments:
    return {"ids": m.some_of(vocab, rows), "weight": m.normal(vocab, size), "out": m.fresh(rows, size)}


def merge_state(
    m: Maker, rows: int, heads: int, head_dim: int, *, unseen: bool = False, base2: bool = False
) -> Arguments:
    """Log-sum-exps near each other, so that neither side's weight is 0.

    unseen: they are further apart, and some queries have keys on one side only, or on none: -inf and +inf.
    """
    call: Arguments = {}
    for place, side in enumerate("ab"):
        lse = m.normal(rows, heads).float()
        if unseen:
            lse *= 3
            lse[place::5] = lse[4::5] = -math.inf if place else math.inf
        call |= {side: m.normal(rows, heads, head_dim), f"{side}_lse": lse}
    outputs = {"out": m.fresh(rows, heads, head_dim), "lse_out": m.fresh(rows, heads, dtype=torch.float32)}
    return call | {"base2": base2} | outputs
