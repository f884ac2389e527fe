"""The prologue and epilogue of a matmul, x @ weight^T + bias."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Fusion(NamedTuple):
    """The ops to fuse with a matmul in a Llama block: RMSNorm of x as prologue, a residual sum or SwiGLU as epilogue.

    norm: [K], the weight of the norm, with its eps. residual: like the result, added to it. gated: the weight is
    [gate | up], and the result silu(gate) * up. residual and gated exclude each other.

    Ops take the fields as separate arguments: SCHEMA, in an op's schema.
    """

    norm: Tensor | None = None
    eps: float = 0.0
    residual: Tensor | None = None
    gated: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether there is neither prologue nor epilogue."""
        return self.norm is None and self.residual is None and not self.gated


Fields = tuple[Tensor | None, float, Tensor | None, bool]  # the fields of a Fusion
SCHEMA = "Tensor? norm, float eps, Tensor? residual, bool gated"
