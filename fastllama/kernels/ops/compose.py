"""A product with a norm in front and a sum or silu * up behind, of ops one after another where no kernel fuses them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastllama.kernels.ops.norm import rms_norm
from fastllama.kernels.ops.swiglu import silu_mul

# Elements that torch adds on one thread. More wake its threads, which then spin for milliseconds on the cores that the
# next kernel's threads need: prompts took twice as long (docs/tuning.md).
ONE_THREAD = 1 << 15


def compose(
    product: Callable[[Tensor, Tensor], object],
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    out: Tensor,
    residual: Tensor | None = None,
    gated: bool = False,
) -> None:
    """out = what `product(x, out)` writes, of normalised rows x, plus `residual` or as silu(gate) * up of it."""
    if norm is not None:
        x = rms_norm(x, norm, eps)
    if gated:
        gate_up = out.new_empty(*out.shape[:-1], 2 * out.shape[-1])
        product(x, gate_up)
        silu_mul(gate_up, out=out)
    elif residual is not None:
        found = torch.empty_like(out)  # out may be residual itself
        product(x, found)
        _add(residual, found, out)
    else:
        product(x, out)


def _add(a: Tensor, b: Tensor, out: Tensor) -> None:
    if out.device.type != "cpu" or out.numel() <= ONE_THREAD:
        torch.add(a, b, out=out)
        return
    for parts in zip(*(each.view(-1).split(ONE_THREAD) for each in (a, b, out)), strict=True):
        torch.add(*parts[:2], out=parts[2])


def composed(product: Callable[..., None]) -> Callable[..., None]:
    """An implementation in out-form of an op around a product: `product(x, *weight, bias, out)`, and a workspace last.

    The op's arguments are x, *weight, bias, norm, eps, residual, gated, out, and a workspace where product takes one.
    """
    tail = 2 if "workspace" in inspect.signature(product).parameters else 1

    @functools.wraps(product)
    def run(x: Tensor, *args: Any) -> None:
        weight, (norm, eps, residual, gated), (out, *workspace) = (
            args[: -4 - tail],
            args[-4 - tail : -tail],
            args[-tail:],
        )
        compose(lambda x, out: product(x, *weight, out, *workspace), x, norm, eps, out, residual, gated)

    return run


def fuses_norm(x: Tensor) -> bool:
    """Whether a kernel of few rows takes the norm, whose weight multiplies x before its factor does.

    Not of fp16, where that may leave the range, nor of fp32, of which a tile in registers spills.
    """
    return x.dtype == torch.bfloat16
