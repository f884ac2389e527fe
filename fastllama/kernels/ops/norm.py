"""The ops rms_norm and add_rms_norm."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllama.kernels import reference
from fastllama.kernels.dispatch.checks import FLOATS, check_elements, check_tensor
from fastllama.kernels.dispatch.op import Op
from fastllama.kernels.ops.compiled import numba_kernels, triton_kernels


def _check_rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    shape = x.shape
    if not shape:
        raise ValueError("x has shape []; legal: [..., H]")
    check_elements("x", x, FLOATS)
    check_tensor("weight", weight, (shape[-1],), (x.dtype, torch.float32))
    check_tensor("out", out, shape, (x.dtype,))


def _check_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor, residual_out: Tensor
) -> None:
    _check_rms_norm(x, weight, eps, out)
    check_tensor("residual", residual, x.shape, (x.dtype,))
    check_tensor("residual_out", residual_out, x.shape, (x.dtype,))


_RMS_NORM = Op(
    "rms_norm(Tensor x, Tensor weight, float eps, Tensor(a!) out) -> ()",
    check=_check_rms_norm,
    reference=reference.rms_norm,
    in_place={"out": {"x": 1}},
    numba=numba_kernels,
    triton=triton_kernels,
)
_ADD_RMS_NORM = Op(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, Tensor(a!) out, Tensor(b!) residual_out) -> ()",
    check=_check_add_rms_norm,
    reference=reference.add_rms_norm,
    in_place={"out": {"x": 1, "residual": 1}, "residual_out": {"x": 1, "residual": 1}},
    numba=numba_kernels,
    triton=triton_kernels,
)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, *, out: Tensor | None = None) -> Tensor:
    """Root-mean-square normalisation over the last dimension: weight * cast(x / sqrt(mean(x^2) + eps)).

    x: [..., H], fp32, fp16 or bf16 (fp64 on the reference), last dimension contiguous, rows at one stride (any on the
    reference). weight: [H], x's dtype or fp32. eps: added to the mean square. out: like x, may be x itself; allocated
    when None. Returns out.
    Accumulates in fp32 and casts to x's dtype before the weight multiplies, as Hugging Face's LlamaRMSNorm does.
    Raises ValueError for a shape, stride or device, TypeError for a dtype; nothing is written then.
    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (2019).

    Example:
        >>> x, weight = torch.ones(1, 3), torch.tensor([1.0, 2.0, 3.0])
        >>> kernels.rms_norm(x, weight, eps=0.0).tolist()
        [[1.0, 2.0, 3.0]]
    """
    if out is None:
        out = torch.empty_like(x)
    _RMS_NORM(x, weight, eps, out)
    return out


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    *,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Residual addition and the norm after it in one pass: returns (rms_norm(x + residual), x + residual).

    x, residual: [..., H], one dtype, strides as for `rms_norm`. weight, eps: as for `rms_norm`.
    out, residual_out: like x; allocated when None. residual_out=residual updates the residual in place; out may be x.
    The sum is rounded to x's dtype before it is normalised, as it is when the two are separate ops.
    Raises ValueError for a shape, stride or device, TypeError for a dtype; nothing is written then.
    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (2019).

    Example:
        >>> out, residual = kernels.add_rms_norm(torch.ones(1, 2), torch.ones(1, 2), torch.ones(2), eps=0.0)
        >>> out.tolist(), residual.tolist()
        ([[1.0, 1.0]], [[2.0, 2.0]])
    """
    if out is None:
        out = torch.empty_like(x)
    if residual_out is None:
        residual_out = torch.empty_like(x)
    _ADD_RMS_NORM(x, residual, weight, eps, out, residual_out)
    return out, residual_out
