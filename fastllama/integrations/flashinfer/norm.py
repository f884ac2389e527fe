"""FlashInfer's norms: rmsnorm, and fused_add_rmsnorm, which updates both of its tensors in place.

Both round once more than FlashInfer's, which multiply by the weight before rounding: the ops round x / rms(x) to x's
dtype first, as Hugging Face's LlamaRMSNorm, and fused_add_rmsnorm normalises the rounded sum. With u, half the dtype's
eps, the result is within 2 u of the exact norm (4 u after an addition), FlashInfer's within u: in bfloat16 0.8 %
(1.6 %) of each element instead of 0.4 %. In fp32 both are exact to fp32's rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastllama import kernels
from fastllama.errors import check_dtype, check_rows, check_shape
from fastllama.integrations.flashinfer.checks import check_optional, check_tensors

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def rmsnorm(
    input: Tensor, weight: Tensor, eps: float = 1e-6, out: Tensor | None = None, enable_pdl: bool | None = None
) -> Tensor:
    """weight * input / sqrt(mean(input^2) + eps) over the last dimension. Returns out.

    input: [N, H] or [N, heads, H], bfloat16, float16 or fp32, last dimension contiguous. weight: [H], input's dtype or
    fp32. out: like input, may be input itself; allocated when None. enable_pdl: unused.
    Allocates nothing where out is given and rows have one stride; rows of a slice [N, heads, H] are copied.
    Raises ValueError for a shape, stride or device, TypeError for a dtype; nothing is written then.
    """
    check_tensors(input=input, weight=weight)
    check_optional(out=out)
    if input.dim() not in (2, 3):
        raise ValueError(f"input has shape {list(input.shape)}; legal: [N, H] or [N, heads, H]")
    check_dtype("input", input, _FLOATS)
    check_rows("input", input)
    check_shape("weight", weight, input.shape[-1:])
    if out is None:
        out = torch.empty_like(input)
    check_shape("out", out, input.shape)
    rows = input if _at_one_stride(input) else input.contiguous()
    if _at_one_stride(out):
        return kernels.rms_norm(rows, weight, eps, out=out)
    check_rows("out", out)
    check_dtype("out", out, (input.dtype,))
    return out.copy_(kernels.rms_norm(rows, weight, eps))


def fused_add_rmsnorm(
    input: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, enable_pdl: bool | None = None
) -> None:
    """residual += input, then input = weight * residual / sqrt(mean(residual^2) + eps).

    input, residual: [N, H], one dtype of bfloat16, float16 and fp32, last dimension contiguous; both are written.
    weight: [H], their dtype or fp32. enable_pdl: unused. Allocates nothing.
    Raises ValueError for a shape, stride or device, TypeError for a dtype; nothing is written then.
    """
    check_tensors(input=input, residual=residual, weight=weight)
    check_shape("input", input, ("N", "H"))
    check_dtype("input", input, _FLOATS)
    check_rows("input", input)
    kernels.add_rms_norm(input, residual, weight, eps, out=input, residual_out=residual)


def _at_one_stride(x: Tensor) -> bool:
    """Whether x can be viewed as a matrix of rows."""
    if x.dim() == 2 or 0 in x.shape or 1 in x.shape[:2]:
        return True
    return x.stride(0) == x.shape[1] * x.stride(1)
