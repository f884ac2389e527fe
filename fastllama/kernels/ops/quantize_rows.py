"""Row-wise int8 quantization: the op quantize_rows, and norms and silu_mul with it as their epilogue."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastllama.kernels import reference
from fastllama.kernels.dispatch.checks import FLOATS, check_elements, check_tensor
from fastllama.kernels.dispatch.op import Op
from fastllama.kernels.ops.compiled import triton_kernels
from fastllama.kernels.ops.swiglu import silu_mul_shape

SCALES = (torch.float64, torch.float32)  # of rows; fp64 is the oracle's


def _check_quantize(x: Tensor, out: Tensor, scales_out: Tensor) -> None:
    if not (x.shape and x.shape[-1]):
        raise ValueError(f"x has shape {list(x.shape)}; legal: [..., K] with K >= 1")
    check_elements("x", x, FLOATS)
    _check_rows_out(out, scales_out, x.shape)


def _check_rows_out(out: Tensor, scales_out: Tensor, shape: Sequence[int]) -> None:
    """Raise ValueError or TypeError unless out and scales_out are legal for quantized rows of a shape."""
    check_tensor("out", out, shape, (torch.int8,))
    check_tensor("scales_out", scales_out, shape[:-1], SCALES)


def _empty_rows(
    shape: Sequence[int], device: torch.device, out: Tensor | None, scales_out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """out and scales_out for quantized rows of a shape, allocated where they are None."""
    if out is None:
        out = torch.empty(shape, dtype=torch.int8, device=device)
    if scales_out is None:
        scales_out = torch.empty(shape[:-1], dtype=torch.float32, device=device)
    return out, scales_out


def _check_rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, scales_out: Tensor) -> None:
    shape = x.shape
    if not (shape and shape[-1]):
        raise ValueError(f"x has shape {list(shape)}; legal: [..., H] with H >= 1")
    check_elements("x", x, FLOATS)
    check_tensor("weight", weight, (shape[-1],), (x.dtype, torch.float32))
    _check_rows_out(out, scales_out, shape)


def _check_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor, scales_out: Tensor
) -> None:
    _check_rms_norm(x, weight, eps, out, scales_out)
    check_tensor("residual", residual, x.shape, (x.dtype,))


def _check_silu_mul(gate_up: Tensor, out: Tensor, scales_out: Tensor) -> None:
    shape = silu_mul_shape(gate_up)
    if not shape[-1]:
        raise ValueError(f"gate_up has shape {list(gate_up.shape)}; legal: [..., 2I] with I >= 1")
    check_elements("gate_up", gate_up, FLOATS)
    _check_rows_out(out, scales_out, shape)


_QUANTIZE = Op(
    "quantize_rows(Tensor x, Tensor(a!) out, Tensor(b!) scales_out) -> ()",
    check=_check_quantize,
    reference=reference.quantize_rows,
    triton=triton_kernels,
)
_RMS_NORM = Op(
    "rms_norm_int8(Tensor x, Tensor weight, float eps, Tensor(a!) out, Tensor(b!) scales_out) -> ()",
    check=_check_rms_norm,
    reference=reference.rms_norm_int8,
    triton=triton_kernels,
)
_ADD_RMS_NORM = Op(
    "add_rms_norm_int8(Tensor x, Tensor(c!) residual, Tensor weight, float eps, Tensor(a!) out, Tensor(b!) scales_out) "
    "-> ()",
    check=_check_add_rms_norm,
    reference=reference.add_rms_norm_int8,
    triton=triton_kernels,
)
_SILU_MUL = Op(
    "silu_mul_int8(Tensor gate_up, Tensor(a!) out, Tensor(b!) scales_out) -> ()",
    check=_check_silu_mul,
    reference=reference.silu_mul_int8,
    triton=triton_kernels,
)


def quantize_rows(x: Tensor, *, out: Tensor | None = None, scales_out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize x to int8 with a scale for each row, x = out * scales_out up to rounding. Returns (out, scales_out).

    x: [..., K], any floating dtype, last dimension contiguous, rows at one stride (any on the reference). out: [..., K]
    int8 and scales_out: [...] fp32, both contiguous; allocated when None.
    A scale is the row's largest magnitude / 127; its element becomes 127 or -127. Magnitudes below 2^-100 count as
    2^-100.
    Computed in fp32; values are rounded to nearest even. A row that holds an infinity or a NaN becomes zeros with an
    infinite or NaN scale, so that matmuls return NaN for this row alone.
    Raises ValueError for a shape, stride or device, TypeError for a dtype; nothing is written then.
    Source: Dettmers et al., LLM.int8() (2022), row-wise absmax quantization.

    Example:
        >>> values, scales = kernels.quantize_rows(torch.tensor([[127.0, 1.0], [-254.0, 2.0]]))
        >>> values.tolist(), scales.tolist()
        ([[127, 1], [-127, 1]], [1.0, 2.0])
    """
    out, scales_out = _empty_rows(x.shape, x.device, out, scales_out)
    _QUANTIZE(x, out, scales_out)
    return out, scales_out


def rms_norm_int8(
    x: Tensor, weight: Tensor, eps: float = 1e-5, *, out: Tensor | None = None, scales_out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`rms_norm` fused with `quantize_rows`. Returns (out, scales_out).

    x: [..., H], weight, eps: as for `rms_norm`. out: [..., H] int8 and scales_out: [...] fp32 as for `quantize_rows`.
    The norm is rounded to x's dtype before it is quantized, as when the two are separate ops.
    Raises ValueError for a shape, stride or device, TypeError for a dtype; nothing is written then.
    Source: kernels/reference/w8a8.py.

    Example:
        >>> x, weight = torch.ones(1, 2), torch.tensor([127.0, 1.0])
        >>> values, scales = kernels.rms_norm_int8(x, weight, eps=0.0)
        >>> values.tolist(), scales.tolist()
        ([[127, 1]], [1.0])
    """
    out, scales_out = _empty_rows(x.shape, x.device, out, scales_out)
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
    """`add_rms_norm` fused with `quantize_rows`. Returns (out, scales_out).

    x: [..., H] and residual: [..., H], one dtype, weight, eps: as for `add_rms_norm`; residual becomes x + residual, in
    place. out: [..., H] int8 and scales_out: [...] fp32 as for `quantize_rows`.
    Sum and norm are rounded to x's dtype, as when these are separate ops.
    Raises ValueError for a shape, stride or device, TypeError for a dtype; nothing is written then.
    Source: kernels/reference/w8a8.py.

    Example:
        >>> residual, weight = torch.ones(1, 2), torch.tensor([127.0, 1.0])
        >>> values, scales = kernels.add_rms_norm_int8(torch.ones(1, 2), residual, weight, eps=0.0)
        >>> values.tolist(), scales.tolist(), residual.tolist()
        ([[127, 1]], [1.0], [[2.0, 2.0]])
    """
    out, scales_out = _empty_rows(x.shape, x.device, out, scales_out)
    _ADD_RMS_NORM(x, residual, weight, eps, out, scales_out)
    return out, scales_out


def silu_mul_int8(
    gate_up: Tensor, *, out: Tensor | None = None, scales_out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`silu_mul` fused with `quantize_rows`. Returns (out, scales_out).

    gate_up: [..., 2I] as for `silu_mul`. out: [..., I] int8 and scales_out: [...] fp32 as for `quantize_rows`.
    silu(gate) * up is rounded to gate_up's dtype before it is quantized, as when the two are separate ops.
    Raises ValueError for a shape, stride or device, TypeError for a dtype; nothing is written then.
    Source: kernels/reference/w8a8.py.

    Example:
        >>> gate, up = torch.tensor([[100.0, 0.0]]), torch.tensor([[1.27, 5.0]])
        >>> values, scales = kernels.silu_mul_int8(torch.cat([gate, up], -1))
        >>> values.tolist(), round(scales.item(), 5)
        ([[127, 0]], 1.0)
    """
    out, scales_out = _empty_rows(silu_mul_shape(gate_up), gate_up.device, out, scales_out)
    _SILU_MUL(gate_up, out, scales_out)
    return out, scales_out
