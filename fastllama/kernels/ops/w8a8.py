"""The op matmul_w8a8: int8 activations by an int8 weight."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllama.errors import check_shape
from fastllama.kernels import cpu, reference
from fastllama.kernels.dispatch.checks import FLOATS, check_elements, check_packed, check_tensor, check_workspace
from fastllama.kernels.dispatch.op import Op
from fastllama.kernels.ops.compiled import triton_kernels
from fastllama.kernels.ops.quantize_rows import SCALES
from fastllama.kernels.reference.int8 import packed_shape
from fastllama.kernels.reference.w8a8 import MOST_COLUMNS

_CODES = (torch.int8,)


def _check_matmul(
    x: Tensor,
    x_scales: Tensor,
    packed: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    out: Tensor,
    workspace: Tensor | None,
) -> None:
    shape = _result_shape(x, scales)
    size, features = x.shape[-1], shape[-1]
    check_elements("x", x, _CODES)
    check_tensor("x_scales", x_scales, x.shape[:-1], SCALES)
    check_packed(packed, packed_shape(features, size), torch.int8)
    check_tensor("out", out, shape, FLOATS)
    dtypes = tuple(dict.fromkeys((out.dtype, torch.float32)))
    check_tensor("scales", scales, (features,), dtypes)
    if bias is not None:
        check_tensor("bias", bias, (features,), dtypes)
    check_workspace(workspace, torch.int32)


def _result_shape(x: Tensor, scales: Tensor) -> tuple[int, ...]:
    *leading, size = x.shape or (0,)
    if not 0 < size <= MOST_COLUMNS:
        raise ValueError(f"x has shape {list(x.shape)}; legal: [..., K] with K from 1 to {MOST_COLUMNS}")
    check_shape("scales", scales, ("N",))
    return (*leading, scales.shape[0])


_MATMUL = Op(
    "matmul_w8a8(Tensor x, Tensor x_scales, Tensor packed, Tensor scales, Tensor? bias, Tensor(a!) out, "
    "Tensor(c!)? workspace) -> ()",
    check=_check_matmul,
    reference=reference.matmul_w8a8,
    cpu=cpu.matmul_w8a8,
    triton=triton_kernels,
)


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
    """(x * x_scales) @ weight^T (+ bias) for int8 x and a weight of packed 8-bit values q: weight = q * scale.

    x: [..., K] int8, rows at one stride, and x_scales: [...] fp32, from `quantize_rows`. packed: [ceil(N / 64),
    ceil(K / 128), 4, 128, 16] int8, from `pack_int8`. scales: [N], one for each row of the weight. bias: [N] or
    None; both in out's dtype or fp32. out: [..., N], any floating dtype, that of scales when None. workspace: scratch
    memory from `matmul_w8a8_workspace`; allocated when None and needed. Returns out.
    Accumulates in int32, exact in any order, as up to 131071 columns cannot overflow; so results are batch-invariant,
    bit for bit. Both scales are then applied in fp32, the bias is added, and the result is rounded once.
    Raises ValueError for a shape, stride or device, TypeError for a dtype; nothing is written then.
    Source: kernels/reference/w8a8.py.

    Example:
        >>> x, x_scales = kernels.quantize_rows(torch.full((1, 32), 127.0))
        >>> packed, scales = kernels.pack_int8(torch.ones(2, 32, dtype=torch.int8)), torch.tensor([1.0, 0.5])
        >>> kernels.matmul_w8a8(x, x_scales, packed, scales).tolist()
        [[4064.0, 2032.0]]
    """
    if out is None:
        out = torch.empty(_result_shape(x, scales), dtype=scales.dtype, device=x.device)
    _MATMUL(x, x_scales, packed, scales, bias, out, workspace)
    return out


def matmul_w8a8_workspace(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """Scratch memory for `matmul_w8a8` of tensors of these shapes, reused from call to call: [S] int32.

    Where a Triton kernel runs with split-K, as for few rows: a number for each element of out and each split. Empty
    elsewhere. Not to be shared by overlapping calls.

    Example:
        >>> x, packed = torch.ones(1, 32, dtype=torch.int8), kernels.pack_int8(torch.ones(2, 32, dtype=torch.int8))
        >>> kernels.matmul_w8a8_workspace(x, packed, torch.ones(2)).shape  # a CPU needs none
        torch.Size([0])
    """
    return _MATMUL.workspace(x.device, torch.int32, x, packed, scales)
