"""Products in which no row's result depends on another row, bit for bit, however many there are."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastllama.kernels.dispatch.checks import as_rows
from fastllama.kernels.dispatch.op import Op


def product(
    op: Op,
    deterministic: bool,
    x: Tensor,
    weight: tuple[Any, ...],
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
    gated: bool,
    out: Tensor,
    *workspace: Tensor | None,
) -> None:
    """Run a product's op; where `deterministic`, in blocks of rows among which each is what it would be alone.

    weight: what the op takes between x and norm.
    """
    args = (x, *weight, norm, eps, residual, gated, out, *workspace)
    rows = x.numel() // x.shape[-1] if deterministic and x.numel() else 1
    block = rows if rows == 1 else op.alone(x.device, x, weight[0])
    if rows <= block:
        op(*args)
        return
    op.check(args)
    given, target = as_rows("x", x), as_rows("out", out)
    added = None if residual is None else as_rows("residual", residual)
    for first in range(0, rows, block):
        some = slice(first, first + block)
        op(given[some], *weight, norm, eps, None if added is None else added[some], gated, target[some], *workspace)
