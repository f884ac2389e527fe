"""The gated activation of Llama's MLP."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastllama.kernels.reference.numerics import wide


def silu_mul(gate_up: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up for gate_up = [gate | up] along the last dimension, or of two tensors; rounded once."""
    gate, up = gate_up.chunk(2, dim=-1) if up is None else (gate_up, up)
    return (F.silu(wide(gate)) * wide(up)).to(gate_up.dtype)
