"""The gated activation of Llama's MLP."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastllama.kernels.reference.numerics import wide


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for gate_up = [gate | up] along the last dimension; one rounding, at the end."""
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.silu(wide(gate)) * wide(up)).to(gate_up.dtype)
