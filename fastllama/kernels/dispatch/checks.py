"""Checks of an op's tensors: shape, dtype and strides; 0.3 us for each legal tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastllama.errors import check_dtype, check_rows, check_shape
from fastllama.kernels.dispatch.fusion import Fusion

KERNEL_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
FLOATS = (*KERNEL_FLOATS, torch.float64)  # fp64 is for the oracle: no Triton kernel accepts it
INTEGERS = (torch.int32, torch.int64)
CODES = (torch.int8, torch.float8_e4m3fn)  # dtypes of quantized pages


def check_tensor(name: str, tensor: Tensor, shape: Sequence[int], dtypes: Sequence[torch.dtype]) -> None:
    """Raise ValueError for another shape or rows that are not contiguous, TypeError for a dtype not in `dtypes`."""
    if tensor.shape != shape or tensor.dtype not in dtypes or not tensor.is_contiguous():
        check_shape(name, tensor, shape)
        check_dtype(name, tensor, dtypes)
        check_rows(name, tensor)


def check_elements(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """`check_tensor` for a tensor whose shape the caller has checked."""
    if tensor.dtype not in dtypes or not tensor.is_contiguous():
        check_dtype(name, tensor, dtypes)
        check_rows(name, tensor)


def check_packed(packed: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    """`check_tensor` for a packed weight [tiles, tiles, ...], each row of tiles contiguous."""
    check_tensor("packed", packed, shape, (dtype,))
    _, _, a, b, c = shape
    if packed.stride()[1:] != (a * b * c, b * c, c, 1):
        raise ValueError(f"packed has strides {list(packed.stride())}; legal: contiguous but for the first dimension")


def check_scales(name: str, scales: Tensor | None, pages: Tensor, instead: str = "") -> None:
    """Raise ValueError unless quantized pages have scales [P, Hkv, page_size], and other pages none.

    instead: the legal alternative for quantized pages, for the message.
    """
    quantized = pages.dtype in CODES
    if scales is not None and quantized:
        check_tensor(name, scales, pages.shape[:3], (torch.float32,))
    elif scales is not None or quantized:
        shape = list(pages.shape[:3])
        seen = "None" if scales is None else f"a tensor {list(scales.shape)}"
        legal = f"a tensor {shape}{instead}" if quantized else "None"
        raise ValueError(f"{name} is {seen}; legal for pages of {pages.dtype}: {legal}")


def check_page_scales(
    k_scales: Tensor | None, v_scales: Tensor | None, k_scale: float | None, v_scale: float | None, pages: Tensor
) -> None:
    """`check_scales` of keys and values, where both tensors, or neither, may be replaced by one number each."""
    for name, scales, number in (("k_scale", k_scales, k_scale), ("v_scale", v_scales, v_scale)):
        if number is None:
            check_scales(f"{name}s", scales, pages, f", or a number as {name}")
        elif scales is not None:
            raise ValueError(f"{name} is {number}; legal where {name}s is a tensor: None")
    if pages.dtype in CODES and (k_scale is None) != (v_scale is None):
        raise ValueError(
            f"k_scale is {k_scale}, v_scale {v_scale}; legal for pages of {pages.dtype}: both numbers, "
            "or k_scales and v_scales both tensors"
        )


def check_scale(name: str, scale: float) -> None:
    """Raise ValueError unless one scale for all pages is a positive normal number of fp32."""
    low, high = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    if not low <= scale <= high:  # also true for NaN
        raise ValueError(f"{name} is {scale!r}; legal: from {low:.4g} to {high:.4g}, the normal numbers of fp32")


def matmul_shape(leading: Sequence[int], features: int, gated: bool) -> tuple[int, ...]:
    """The shape of a matmul's result. Raises ValueError for a gated weight of an odd number of rows."""
    if gated and features % 2:
        raise ValueError(f"gated is True; legal for a weight of {features} rows, which is odd: False")
    return (*leading, features // 2 if gated else features)


def check_matmul(x: Tensor, features: int, bias: Tensor | None, fusion: Fusion, out: Tensor) -> None:
    """Raise ValueError or TypeError unless x, bias, fusion and out are legal for a weight of `features` rows."""
    norm, _, residual, gated = fusion
    dtype, shape = (x.dtype,), matmul_shape(x.shape[:-1], features, gated)
    check_elements("x", x, FLOATS)
    if bias is not None:
        check_tensor("bias", bias, (features,), dtype)
    if norm is not None:
        check_tensor("norm", norm, x.shape[-1:], (x.dtype, torch.float32))
    if residual is not None:
        if gated:
            raise ValueError("residual is a tensor; legal where gated is True: None")
        check_tensor("residual", residual, shape, dtype)
    check_tensor("out", out, shape, dtype)


def check_workspace(workspace: Tensor | None, dtype: torch.dtype) -> None:
    """Raise ValueError or TypeError unless `workspace` is None or contiguous [N] of the dtype; any N is legal."""
    if workspace is not None:
        check_tensor("workspace", workspace, workspace.shape[:1], (dtype,))


def check_kernel_dtype(name: str, tensor: Tensor) -> None:
    """Raise TypeError for fp64, which no Triton kernel accepts."""
    if tensor.dtype not in KERNEL_FLOATS:
        check_dtype(name, tensor, KERNEL_FLOATS)


def as_int32(numbers: Tensor) -> Tensor:
    """Lengths, pages or bounds as int32; a number out of range is clamped to one that is illegal too."""
    return numbers if numbers.dtype == torch.int32 else numbers.clamp(-1, 2**31 - 1).to(torch.int32)


def as_rows(name: str, tensor: Tensor) -> Tensor:
    """A view [rows, H] of `tensor` [..., H]. Raises ValueError unless its rows are at one stride."""
    if tensor.dim() == 2:
        return tensor
    *leading, size = tensor.shape
    try:
        return tensor.view(math.prod(leading), size)
    except RuntimeError:
        raise ValueError(f"{name} has strides {list(tensor.stride())}; legal: all rows at one stride") from None
