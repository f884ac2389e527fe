"""silu_mul."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllama.kernels import reference
from fastllama.kernels.dispatch.checks import FLOATS, check_elements, check_tensor
from fastllama.kernels.dispatch.op import Op
from fastllama.kernels.ops.compiled import numba_kernels, triton_kernels


def _check(gate_up: Tensor, out: Tensor) -> None:
    shape = silu_mul_shape(gate_up)
    check_elements("gate_up", gate_up, FLOATS)
    check_tensor("out", out, shape, (gate_up.dtype,))


def silu_mul_shape(gate_up: Tensor) -> tuple[int, ...]:
    """Of silu(gate) * up. Raises ValueError for a shape."""
    *leading, width = gate_up.shape or (1,)
    if width % 2:
        raise ValueError(f"gate_up has shape {list(gate_up.shape)}; legal: [..., 2I], an even last dimension")
    return (*leading, width // 2)


_SILU_MUL = Op(
    "silu_mul(Tensor gate_up, Tensor(a!) out) -> ()",
    check=_check,
    reference=reference.silu_mul,
    in_place={"out": {"gate_up": 2}},
    numba=numba_kernels,
    triton=triton_kernels,
)


def silu_mul(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """silu(gate) * up of the fused gate and up projection, gate_up = [gate | up] along the last dimension.

    gate_up: [..., 2I], any floating dtype, last dimension contiguous, rows at one stride (any on the reference).
    out: [..., I]; allocated when None. Returns out.
    Computed in fp32, rounded to the input's dtype at the end.
    Raises ValueError for a shape, stride or device, TypeError for a dtype; nothing is written then.
    Source: Shazeer, GLU Variants Improve Transformer (2020).
    """
    if out is None:
        out = torch.empty(silu_mul_shape(gate_up), dtype=gate_up.dtype, device=gate_up.device)
    _SILU_MUL(gate_up, out)
    return out
