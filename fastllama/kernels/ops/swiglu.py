"""The op silu_mul: SwiGLU's activation."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllama.kernels import reference
from fastllama.kernels.dispatch.checks import FLOATS, check_elements, check_tensor
from fastllama.kernels.dispatch.op import Op
from fastllama.kernels.ops.compiled import numba_kernels, triton_kernels


def _check(gate_up: Tensor, up: Tensor | None, out: Tensor) -> None:
    shape = silu_mul_shape(gate_up, up)
    check_elements("gate_up", gate_up, FLOATS)
    if up is not None:
        check_tensor("up", up, shape, (gate_up.dtype,))
    check_tensor("out", out, shape, (gate_up.dtype,))


def silu_mul_shape(gate_up: Tensor, up: Tensor | None = None) -> tuple[int, ...]:
    """The shape of silu(gate) * up. Raises ValueError for a shape."""
    if up is not None and gate_up.dim():
        return tuple(gate_up.shape)
    *leading, width = gate_up.shape or (1,)
    if width % 2:
        raise ValueError(f"gate_up has shape {list(gate_up.shape)}; legal: [..., 2I], an even last dimension")
    return (*leading, width // 2)


_SILU_MUL = Op(
    "silu_mul(Tensor gate_up, Tensor? up, Tensor(a!) out) -> ()",
    check=_check,
    reference=reference.silu_mul,
    in_place={"out": {"gate_up": 2, "up": 1}},
    numba=numba_kernels,
    triton=triton_kernels,
)


def silu_mul(gate_up: Tensor, up: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """silu(gate) * up of the fused projection gate_up = [gate | up], split along the last dimension, or of two tensors.

    gate_up: [..., 2I], any floating dtype, last dimension contiguous, rows at one stride (any on the reference).
    up: [..., I] in gate_up's dtype, any row stride; gate_up is then the gate alone, [..., I].
    out: [..., I], may be either half of gate_up, the gate or up; allocated when None. Returns out.
    Computed in fp32, rounded to the input's dtype at the end.
    Raises ValueError for a shape, stride or device, TypeError for a dtype; nothing is written then.
    Source: Shazeer, GLU Variants Improve Transformer (2020).

    Example:
        >>> gate, up = torch.tensor([[0.0, 100.0]]), torch.tensor([[5.0, 2.0]])
        >>> kernels.silu_mul(torch.cat([gate, up], -1)).tolist()  # silu(100) is 100 in fp32
        [[0.0, 200.0]]
        >>> kernels.silu_mul(gate, up).tolist()
        [[0.0, 200.0]]
    """
    if out is None:
        out = torch.empty(silu_mul_shape(gate_up, up), dtype=gate_up.dtype, device=gate_up.device)
    _SILU_MUL(gate_up, up, out)
    return out
