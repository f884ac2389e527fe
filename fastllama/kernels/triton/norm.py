"""RMSNorm in Triton, with or without a residual addition in front: one kernel, one pass over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllama.kernels.checks import as_rows


# One program owns one row.
@triton.jit
def norm_kernel(
    out_ptr,
    residual_out_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_row_stride,
    residual_out_row_stride,
    x_row_stride,
    residual_row_stride,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)  # [BLOCK]
    mask = cols < SIZE
    dtype = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * x_row_stride + cols, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + row * residual_row_stride + cols, mask=mask, other=0.0).to(tl.float32)
        total = x.to(dtype)
        tl.store(residual_out_ptr + row * residual_out_row_stride + cols, total, mask=mask)
        x = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)
    normed = (x * scale).to(dtype).to(tl.float32)  # the cast before the weight is Hugging Face's
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_row_stride + cols, (normed * weight).to(dtype), mask=mask)


def num_warps(size: int) -> int:
    """Warps for a row of `size` elements: at most 32 elements a thread up to 8192, so that a row fits in registers."""
    return min(max(triton.next_power_of_2(size) // 512, 1), 16)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """See kernels.rms_norm."""
    _launch(x, None, weight, eps, out, None)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor, residual_out: Tensor) -> None:
    """See kernels.add_rms_norm."""
    _launch(x, residual, weight, eps, out, residual_out)


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor, residual_out: Tensor | None
) -> None:
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"x has dtype {x.dtype}; legal for the Triton kernel: float32, float16, bfloat16")
    named = {"out": out, "residual_out": residual_out, "x": x, "residual": residual}
    rows = {name: as_rows(name, tensor) for name, tensor in named.items() if tensor is not None}
    if x.numel() == 0:
        return
    size = x.shape[-1]
    strides = {name: tensor.stride(0) for name, tensor in rows.items()}
    norm_kernel[(rows["x"].shape[0],)](
        out_ptr=rows["out"],
        residual_out_ptr=rows.get("residual_out"),
        x_ptr=rows["x"],
        residual_ptr=rows.get("residual"),
        weight_ptr=weight,
        out_row_stride=strides["out"],
        residual_out_row_stride=strides.get("residual_out", 0),
        x_row_stride=strides["x"],
        residual_row_stride=strides.get("residual", 0),
        eps=eps,
        SIZE=size,
        BLOCK=triton.next_power_of_2(size),
        HAS_RESIDUAL=residual is not None,
        num_warps=num_warps(size),
    )
