"""The op matmul_int4, and quantizing and packing of its weights."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllama.errors import check_shape
from fastllama.kernels import cpu, reference
from fastllama.kernels.dispatch.checks import (
    FLOATS,
    check_elements,
    check_matmul,
    check_packed,
    check_tensor,
    check_workspace,
    matmul_shape,
)
from fastllama.kernels.dispatch.conversion import Conversion
from fastllama.kernels.dispatch.fusion import Fusion
from fastllama.kernels.ops.compiled import numba_kernels, triton_kernels
from fastllama.kernels.ops.matmul_op import MatmulOp
from fastllama.kernels.reference.int4 import GROUPS, LARGEST, packed_shape

_CODES = (torch.uint8,)


def _check(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    fusion: Fusion,
    out: Tensor,
    workspace: Tensor | None,
) -> None:
    quantized_shape(x, scales, fusion.gated)
    size, features = x.shape[-1], scales.shape[0]
    check_packed(packed, packed_shape(features, size), torch.int32)
    check_groups(scales, zeros, features, size, (x.dtype, torch.float32))
    check_matmul(x, features, bias, fusion, out)
    check_workspace(workspace, torch.float32)


def quantized_shape(x: Tensor, scales: Tensor, gated: bool) -> tuple[int, ...]:
    """The shape of the result of a matmul by a quantized weight. Raises ValueError for shapes."""
    *leading, size = x.shape or (0,)
    if not size:
        raise ValueError(f"x has shape {list(x.shape)}; legal: [..., K] with K >= 1")
    check_shape("scales", scales, ("N", "K / G"))
    return matmul_shape(leading, scales.shape[0], gated)


def check_groups(
    scales: Tensor, zeros: Tensor | None, features: int, size: int, dtypes: tuple[torch.dtype, ...]
) -> None:
    """Raise ValueError or TypeError unless scales and zeros are legal for a weight [features, size]."""
    rows, groups = scales.shape
    if rows != features or (groups != 1 and (not groups or size % groups or size // groups not in GROUPS)):
        raise ValueError(
            f"scales has shape {list(scales.shape)}; legal: [{features}, {size} / G], "
            f"G {', '.join(map(str, GROUPS))} or {size}"
        )
    dtypes = tuple(dict.fromkeys(dtypes))
    check_elements("scales", scales, dtypes)
    if zeros is not None:
        check_tensor("zeros", zeros, scales.shape, (*_CODES, *dtypes))


def check_roundable(weight: Tensor, group_size: int) -> None:
    """Raise ValueError or TypeError unless the weight [N, K] can be quantized in groups of `group_size` columns."""
    check_shape("weight", weight, ("N", "K"))
    check_elements("weight", weight, FLOATS)
    size = weight.shape[1]
    if group_size not in (*GROUPS, size) or size % group_size:
        raise ValueError(f"group_size is {group_size}; legal for K = {size}: a divisor, of {list(GROUPS)} or K itself")
    if weight.numel() and not torch.stack(weight.aminmax()).isfinite().all():
        raise ValueError("weight holds infinities or NaN; legal: finite values")


def _check_quantize(weight: Tensor, group_size: int, symmetric: bool) -> None:
    check_roundable(weight, group_size)


def _check_dequantize(codes: Tensor, scales: Tensor, zeros: Tensor | None) -> None:
    check_shape("codes", codes, ("N", "K"))
    check_elements("codes", codes, _CODES)
    check_shape("scales", scales, ("N", "K / G"))
    check_elements("scales", scales, FLOATS)
    features, size = codes.shape
    check_groups(scales, zeros, features, size, (scales.dtype, torch.float32))


def _check_pack(codes: Tensor) -> None:
    check_shape("codes", codes, ("N", "K"))
    check_elements("codes", codes, _CODES)
    if codes.numel() and (most := int(codes.max())) > LARGEST:
        raise ValueError(f"codes holds {most}; legal: 0 to {LARGEST}")


def _check_unpack(packed: Tensor, rows: int, columns: int) -> None:
    check_tensor("packed", packed, packed_shape(rows, columns), (torch.int32,))


_MATMUL = MatmulOp(
    "matmul_int4",
    "Tensor packed, Tensor scales, Tensor? zeros",
    check=_check,
    reference=reference.matmul_int4,
    cpu=cpu.matmul_int4,
    numba=numba_kernels,
    triton=triton_kernels,
)
_QUANTIZE = Conversion(check=_check_quantize, reference=reference.quantize_int4, numba=numba_kernels)
_DEQUANTIZE = Conversion(check=_check_dequantize, reference=reference.dequantize_int4)
_PACK = Conversion(check=_check_pack, reference=reference.pack_int4, numba=numba_kernels)
_UNPACK = Conversion(check=_check_unpack, reference=reference.unpack_int4)


def matmul_int4(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    gated: bool = False,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    deterministic: bool = False,
) -> Tensor:
    """x @ weight^T (+ bias) for a weight of 4-bit values q, packed: weight = (q - zero) * scale.

    x: [..., K], any floating dtype, rows at one stride. packed: [ceil(N / 64), ceil(K / 128), 2, 128, 4] int32, from
    `pack_int4`; each row of tiles contiguous. scales: [N, K / G] in x's dtype or fp32, one for each group of G
    columns, G 32, 64, 128 or K. zeros: like scales, uint8, x's dtype or fp32, in units of q; 8 when None. bias: [N]
    in x's dtype or None. norm, eps, residual, gated, out, deterministic: as for `matmul`. workspace: scratch
    memory from `matmul_int4_workspace`; allocated when None and needed. Returns out.
    Accumulates in fp32. Up to 64 rows (16 in fp32, 0 in fp32 on sm_100) q and zeros are exact and the result of a row
    is batch-invariant, bit for bit; with more rows, a Triton kernel rounds the weight to x's dtype first.
    Where x holds an infinity, a result may be NaN in place of an infinity.
    Raises ValueError for a shape, stride or device, TypeError for a dtype; nothing is written then.
    Source: kernels/reference/int4.py.

    Example:
        >>> values, scales, zeros = kernels.quantize_int4(torch.ones(2, 32), group_size=32)
        >>> kernels.matmul_int4(torch.ones(1, 32), kernels.pack_int4(values), scales, zeros).tolist()
        [[32.0, 32.0]]
    """
    if out is None:
        out = torch.empty(quantized_shape(x, scales, gated), dtype=x.dtype, device=x.device)
    run = _MATMUL.by_row if deterministic else _MATMUL
    run(x, packed, scales, zeros, bias, norm, eps, residual, gated, out, workspace)
    return out


def matmul_int4_workspace(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """Scratch memory for `matmul_int4` of this x or one of fewer rows, reused from call to call: [S] fp32.

    Where a Triton kernel runs: 4096 zeros as in `matmul_workspace`, then for up to 64 rows (16 in fp32) N numbers for
    each row and each split of K, up to 16 splits in a Llama 2; for more rows, the weight in x's dtype. Empty elsewhere.
    Not to be shared by overlapping calls.

    Example:
        >>> values, scales, zeros = kernels.quantize_int4(torch.ones(2, 32), group_size=32)
        >>> packed = kernels.pack_int4(values)
        >>> kernels.matmul_int4_workspace(torch.ones(1, 32), packed, scales).shape  # a CPU needs none
        torch.Size([0])
    """
    return _MATMUL.workspace(x.device, torch.float32, x, packed, scales)


def quantize_int4(weight: Tensor, group_size: int, *, symmetric: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize a weight [N, K] to 4 bits, rounded to nearest. Returns (`codes`, scales, zeros); see `dequantize_int4`.

    weight: bf16, fp16, fp32 or fp64, finite. group_size: 32, 64, 128 or K, a divisor of K. `codes`: [N, K] uint8, 0 to
    15. scales: [N, K / group_size] in weight's dtype. symmetric: zeros is None, and the value of the largest magnitude
    in a group becomes -8 * scale, so that scales may be negative; otherwise zeros is [N, K / group_size] uint8, and 0
    to 15 span the group's minimum, its maximum and 0. Raises ValueError for a shape or a value, TypeError for a dtype.
    Source: GGML's Q4_0 for the sign of symmetric scales; Jacob et al. (2018) for zeros.

    Example:
        >>> weight = torch.arange(-8.0, 8.0).repeat(1, 2)  # [1, 32]
        >>> values, scales, zeros = kernels.quantize_int4(weight, group_size=32)
        >>> values[0, :4].tolist(), scales.tolist(), zeros
        ([0, 1, 2, 3], [[1.0]], None)
    """
    made: tuple[Tensor, Tensor, Tensor | None] = _QUANTIZE(weight, group_size, symmetric)
    return made


def dequantize_int4(codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
    """The weight [N, K] of 4-bit values q: (q - zero) * scale, computed in at least fp32, rounded to scales' dtype.

    `codes`: q, [N, K] uint8. scales: [N, K / G], any floating dtype, and zeros: like scales, uint8, scales' dtype or
    fp32, or None for 8, as `matmul_int4`. Raises ValueError for a shape, TypeError for a dtype.

    Example:
        >>> values, scales = torch.tensor([[8, 9] * 16], dtype=torch.uint8), torch.tensor([[0.5]])
        >>> kernels.dequantize_int4(values, scales)[0, :2].tolist()
        [0.0, 0.5]
    """
    weight: Tensor = _DEQUANTIZE(codes, scales, zeros)
    return weight


def pack_int4(codes: Tensor) -> Tensor:
    """Pack 4-bit values in the layout of `matmul_int4`: [ceil(N / 64), ceil(K / 128), 2, 128, 4] int32.

    `codes`: [N, K] uint8, 0 to 15. Rows and columns past N and K are padded with 8.
    Raises ValueError for a shape or a value, TypeError for a dtype.

    Example:
        >>> kernels.pack_int4(torch.zeros(100, 256, dtype=torch.uint8)).shape
        torch.Size([2, 2, 2, 128, 4])
    """
    packed: Tensor = _PACK(codes)
    return packed


def unpack_int4(packed: Tensor, rows: int, columns: int) -> Tensor:
    """The 4-bit values [rows, columns] uint8 that `pack_int4` packed.

    Raises ValueError for a shape, TypeError for a dtype.

    Example:
        >>> values = torch.randint(16, (100, 256), dtype=torch.uint8)
        >>> torch.equal(kernels.unpack_int4(kernels.pack_int4(values), 100, 256), values)
        True
    """
    codes: Tensor = _UNPACK(packed, rows, columns)
    return codes
