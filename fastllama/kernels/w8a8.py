"""quantize_rows and matmul_w8a8: products of 8-bit codes on both sides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastllama.errors import check_shape
from fastllama.kernels import cpu, reference
from fastllama.kernels.checks import FLOATS, check_elements, check_tensor, check_workspace
from fastllama.kernels.int8 import check_packed
from fastllama.kernels.op import Op
from fastllama.kernels.reference.w8a8 import MOST_COLUMNS

_CODES = (torch.int8,)
_SCALES = (torch.float64, torch.float32)  # of rows; fp64 is the oracle's


def _check_quantize(x: Tensor, out: Tensor, scales_out: Tensor) -> None:
    if not (x.shape and x.shape[-1]):
        raise ValueError(f"x has shape {list(x.shape)}; legal: [..., K] with K >= 1")
    check_elements("x", x, FLOATS)
    check_rows_out(out, scales_out, x.shape)


def check_rows_out(out: Tensor, scales_out: Tensor, shape: Sequence[int]) -> None:
    """ValueError or TypeError unless these can take the codes and scales of rows."""
    check_tensor("out", out, shape, _CODES)
    check_tensor("scales_out", scales_out, shape[:-1], _SCALES)


def empty_rows(
    shape: Sequence[int], device: torch.device, out: Tensor | None, scales_out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What takes the codes and scales of rows, made where it is None."""
    if out is None:
        out = torch.empty(shape, dtype=torch.int8, device=device)
    if scales_out is None:
        scales_out = torch.empty(shape[:-1], dtype=torch.float32, device=device)
    return out, scales_out


def _check_matmul(
    x: Tensor,
    x_scales: Tensor,
    packed: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    out: Tensor,
    workspace: Tensor | None,
) -> None:
    shape = _product_shape(x, scales)
    size, features = x.shape[-1], shape[-1]
    check_elements("x", x, _CODES)
    check_tensor("x_scales", x_scales, x.shape[:-1], _SCALES)
    check_packed(packed, features, size)
    check_tensor("out", out, shape, FLOATS)
    dtypes = tuple(dict.fromkeys((out.dtype, torch.float32)))
    check_tensor("scales", scales, (features,), dtypes)
    if bias is not None:
        check_tensor("bias", bias, (features,), dtypes)
    check_workspace(workspace, torch.int32)


def _product_shape(x: Tensor, scales: Tensor) -> tuple[int, ...]:
    *leading, size = x.shape or (0,)
    if not 0 < size <= MOST_COLUMNS:
        raise ValueError(f"x has shape {list(x.shape)}; legal: [..., K] with K from 1 to {MOST_COLUMNS}")
    check_shape("scales", scales, ("N",))
    return (*leading, scales.shape[0])


_QUANTIZE = Op(
    "quantize_rows(Tensor x, Tensor(a!) out, Tensor(b!) scales_out) -> ()",
    check=_check_quantize,
    reference=reference.quantize_rows,
    triton="quantize_rows:quantize_rows",
)
_MATMUL = Op(
    "matmul_w8a8(Tensor x, Tensor x_scales, Tensor packed, Tensor scales, Tensor? bias, Tensor(a!) out, "
    "Tensor(c!)? workspace) -> ()",
    check=_check_matmul,
    reference=reference.matmul_w8a8,
    cpu=cpu.matmul_w8a8,
    triton="matmul_w8a8:matmul_w8a8",
)


def quantize_rows(x: Tensor, *, out: Tensor | None = None, scales_out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x as 8-bit codes with a scale for each row: x is about codes * scales. Returns (codes, scales).

    x: [..., K], any floating dtype, last dimension contiguous, rows at one stride (any on the reference). out: [..., K]
    int8 and scales_out: [...] fp32, contiguous, take codes and scales; allocated when None.
    A scale is the row's largest magnitude / 127, which gets code 127 or -127; magnitudes under 2^-100 count as that.
    Computed in fp32; codes are rounded to nearest even. A row that holds an infinity or a NaN gets codes 0 and a scale
    of that kind, so that products with it are NaN and no other row's are.
    Raises ValueError for a shape, stride or device, TypeError for a dtype; nothing is written then.
    Source: Dettmers et al., LLM.int8() (2022), row-wise absmax quantization.
    """
    out, scales_out = empty_rows(x.shape, x.device, out, scales_out)
    _QUANTIZE(x, out, scales_out)
    return out, scales_out


def matmul_w8a8(
    x: Tensor,
    x_scales: Tensor,
    packed: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    *,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """(x * x_scales) @ weight^T (+ bias), where a weight is code * scale and both sides' codes have 8 bits.

    x: [..., K] int8, rows at one stride, and x_scales: [...] fp32, what quantize_rows gave. packed: [ceil(N / 64),
    ceil(K / 128), 4, 128, 16] int8, what pack_int8 gave. scales: [N], one for each row of the weight. bias: [N] or
    None; both in out's dtype or fp32. out: [..., N], any floating dtype, that of scales when None. workspace: scratch
    memory of `matmul_w8a8_workspace`; allocated when None and needed. Returns out.
    Sums are int32, exact whatever their order: up to 131071 columns cannot overflow it. So a row's result is the same,
    bit for bit, whatever the other rows; two products with scales in fp32, the bias, and one rounding follow.
    Raises ValueError for a shape, stride or device, TypeError for a dtype; nothing is written then.
    Source: kernels/reference/w8a8.py.
    """
    if out is None:
        out = torch.empty(_product_shape(x, scales), dtype=scales.dtype, device=x.device)
    _MATMUL(x, x_scales, packed, scales, bias, out, workspace)
    return out


def matmul_w8a8_workspace(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """Scratch memory for `matmul_w8a8` of such tensors, to be kept from call to call: [S] int32, uninitialised.

    Where a Triton kernel runs, a number for each of out and each split of K, where few rows need several. Nothing
    elsewhere. Not to be shared by calls that overlap.
    """
    return _MATMUL.workspace(x.device, torch.int32, x, packed, scales)
