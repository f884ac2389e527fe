"""What a matmul computes besides x @ weight^T + bias."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Fusion(NamedTuple):
    """The ops before and after a matmul in a Llama's block: RMSNorm of x in front, a residual or SwiGLU behind.

    norm: [K], the weight of the norm, and its eps. residual: like the result, added to it. gated: the weight is
    [gate | up], and the result silu(gate) * up. residual and gated exclude each other.

    Ops take its fields one by one: SCHEMA, in an op's schema.
    """

    norm: Tensor | None = None
    eps: float = 0.0
    residual: Tensor | None = None
    gated: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing around the matmul."""
        return self.norm is None and self.residual is None and not self.gated


Fields = tuple[Tensor | None, float, Tensor | None, bool]  # those of a Fusion
SCHEMA = "Tensor? norm, float eps, Tensor? residual, bool gated"
