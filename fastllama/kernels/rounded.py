"""rms_norm, add_rms_norm and silu_mul as 8-bit codes, in the same pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllama.kernels import reference
from fastllama.kernels.checks import FLOATS, check_elements, check_tensor
from fastllama.kernels.op import Op
from fastllama.kernels.swiglu import product_shape
from fastllama.kernels.w8a8 import check_rows_out, empty_rows


def _check_rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, scales_out: Tensor) -> None:
    shape = x.shape
    if not (shape and shape[-1]):
        raise ValueError(f"x has shape {list(shape)}; legal: [..., H] with H >= 1")
    check_elements("x", x, FLOATS)
    check_tensor("weight", weight, (shape[-1],), (x.dtype, torch.float32))
    check_rows_out(out, scales_out, shape)


def _check_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor, scales_out: Tensor
) -> None:
    _check_rms_norm(x, weight, eps, out, scales_out)
    check_tensor("residual", residual, x.shape, (x.dtype,))


def _check_silu_mul(gate_up: Tensor, out: Tensor, scales_out: Tensor) -> None:
    shape = product_shape(gate_up)
    if not shape[-1]:
        raise ValueError(f"gate_up has shape {list(gate_up.shape)}; legal: [..., 2I] with I >= 1")
    check_elements("gate_up", gate_up, FLOATS)
    check_rows_out(out, scales_out, shape)


_RMS_NORM = Op(
    "rms_norm_int8(Tensor x, Tensor weight, float eps, Tensor(a!) out, Tensor(b!) scales_out) -> ()",
    check=_check_rms_norm,
    reference=reference.rms_norm_int8,
    triton="norm:rms_norm_int8",
)
_ADD_RMS_NORM = Op(
    "add_rms_norm_int8(Tensor x, Tensor(c!) residual, Tensor weight, float eps, Tensor(a!) out, Tensor(b!) scales_out) "
    "-> ()",
    check=_check_add_rms_norm,
    reference=reference.add_rms_norm_int8,
    triton="norm:add_rms_norm_int8",
)
_SILU_MUL = Op(
    "silu_mul_int8(Tensor gate_up, Tensor(a!) out, Tensor(b!) scales_out) -> ()",
    check=_check_silu_mul,
    reference=reference.silu_mul_int8,
    triton="swiglu:silu_mul_int8",
)


def rms_norm_int8(
    x: Tensor, weight: Tensor, eps: float = 1e-5, *, out: Tensor | None = None, scales_out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of `rms_norm`, in one pass: returns (codes, scales).

    x: [..., H], weight, eps: as for `rms_norm`. out: [..., H] int8 and scales_out: [...] fp32 as for `quantize_rows`.
    The norm is rounded to x's dtype before it becomes codes, as it is when the two are separate ops.
    Raises ValueError for a shape, stride or device, TypeError for a dtype; nothing is written then.
    Source: kernels/reference/w8a8.py.
    """
    out, scales_out = empty_rows(x.shape, x.device, out, scales_out)
    _RMS_NORM(x, weight, eps, out, scales_out)
    return out, scales_out


def add_rms_norm_int8(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    *,
    out: Tensor | None = None,
    scales_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of the norm after a residual addition, in one pass: returns (codes, scales).

    x: [..., H] and residual: [..., H], one dtype, weight, eps: as for `add_rms_norm`; residual becomes x + residual, in
    place. out: [..., H] int8 and scales_out: [...] fp32 as for `quantize_rows`.
    Sum and norm are rounded to x's dtype, as they are when these are separate ops.
    Raises ValueError for a shape, stride or device, TypeError for a dtype; nothing is written then.
    Source: kernels/reference/w8a8.py.
    """
    out, scales_out = empty_rows(x.shape, x.device, out, scales_out)
    _ADD_RMS_NORM(x, residual, weight, eps, out, scales_out)
    return out, scales_out


def silu_mul_int8(
    gate_up: Tensor, *, out: Tensor | None = None, scales_out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of `silu_mul`, in one pass: returns (codes, scales).

    gate_up: [..., 2I] as for `silu_mul`. out: [..., I] int8 and scales_out: [...] fp32 as for `quantize_rows`.
    The product is rounded to gate_up's dtype before it becomes codes, as it is when the two are separate ops.
    Raises ValueError for a shape, stride or device, TypeError for a dtype; nothing is written then.
    Source: kernels/reference/w8a8.py.
    """
    out, scales_out = empty_rows(product_shape(gate_up), gate_up.device, out, scales_out)
    _SILU_MUL(gate_up, out, scales_out)
    return out, scales_out
