"""Runs the norm, the matmul and the residual sum or SwiGLU as separate ops, where no kernel fuses them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastllama.kernels.dispatch.checks import as_rows
from fastllama.kernels.dispatch.fusion import Fields
from fastllama.kernels.ops.norm import rms_norm
from fastllama.kernels.ops.swiglu import silu_mul

# Elements that torch adds on one thread. A larger sum wakes torch's thread pool, which then spins for milliseconds on
# the cores that the next kernel needs: prompts took twice as long (docs/measured/cpu.md).
ONE_THREAD = 1 << 15


def compose(matmul: Callable[[Tensor, Tensor], object], x: Tensor, fusion: Fields, out: Tensor) -> None:
    """Run `matmul(x, out)` with the prologue and epilogue of a Fusion, or of its fields in a plain tuple."""
    norm, eps, residual, gated = fusion
    if norm is not None:
        x = rms_norm(x, norm, eps)
    if gated:
        gate_up = out.new_empty(*out.shape[:-1], 2 * out.shape[-1])
        matmul(x, gate_up)
        silu_mul(gate_up, out=out)
    elif residual is not None:
        found = torch.empty_like(out)  # out may be residual itself
        matmul(x, found)
        _add(residual, found, out)
    else:
        matmul(x, out)


def _add(a: Tensor, b: Tensor, out: Tensor) -> None:
    if out.device.type != "cpu" or out.numel() <= ONE_THREAD:
        torch.add(a, b, out=out)
        return
    rows = [as_rows(name, each) for name, each in (("residual", a), ("out", b), ("out", out))]
    for parts in zip(*(each.split(max(ONE_THREAD // out.shape[-1], 1)) for each in rows), strict=True):
        torch.add(*parts[:2], out=parts[2])
