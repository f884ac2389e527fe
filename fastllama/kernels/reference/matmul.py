"""Dense products with weights stored [N, K], and the embedding lookup."""

from __future__ import annotations

from torch import Tensor

from fastllama.kernels.reference.numerics import wide


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] @ weight [N, K]^T (+ bias [N]), accumulated in at least fp32 and rounded once."""
    y = wide(x) @ wide(weight).T
    if bias is not None:
        y = y + wide(bias)
    return y.to(x.dtype)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows weight[ids] of [V, H]."""
    return weight.index_select(0, ids)
