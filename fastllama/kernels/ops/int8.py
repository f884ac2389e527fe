"""The op matmul_int8, and quantizing and packing of its weights."""

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
)
from fastllama.kernels.dispatch.conversion import Conversion
from fastllama.kernels.dispatch.fusion import Fusion
from fastllama.kernels.ops.compiled import numba_kernels, triton_kernels
from fastllama.kernels.ops.int4 import check_groups, check_roundable, quantized_shape
from fastllama.kernels.ops.matmul_op import MatmulOp
from fastllama.kernels.reference.int8 import packed_shape

_CODES = (torch.int8,)


def _check(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    fusion: Fusion,
    out: Tensor,
    workspace: Tensor | None,
) -> None:
    quantized_shape(x, scales, fusion.gated)
    size, features = x.shape[-1], scales.shape[0]
    check_packed(packed, packed_shape(features, size), torch.int8)
    check_groups(scales, None, features, size, (x.dtype, torch.float32))
    check_matmul(x, features, bias, fusion, out)
    check_workspace(workspace, torch.float32)


def _check_dequantize(codes: Tensor, scales: Tensor) -> None:
    check_shape("codes", codes, ("N", "K"))
    check_elements("codes", codes, _CODES)
    check_shape("scales", scales, ("N", "K / G"))
    features, size = codes.shape
    check_groups(scales, None, features, size, FLOATS)


def _check_pack(codes: Tensor) -> None:
    check_shape("codes", codes, ("N", "K"))
    check_elements("codes", codes, _CODES)


def _check_unpack(packed: Tensor, rows: int, columns: int) -> None:
    check_tensor("packed", packed, packed_shape(rows, columns), _CODES)


_MATMUL = MatmulOp(
    "matmul_int8",
    "Tensor packed, Tensor scales",
    check=_check,
    reference=reference.matmul_int8,
    cpu=cpu.matmul_int8,
    numba=numba_kernels,
    triton=triton_kernels,
)
_QUANTIZE = Conversion(check=check_roundable, reference=reference.quantize_int8, numba=numba_kernels)
_DEQUANTIZE = Conversion(check=_check_dequantize, reference=reference.dequantize_int8)
_PACK = Conversion(check=_check_pack, reference=reference.pack_int8, numba=numba_kernels)
_UNPACK = Conversion(check=_check_unpack, reference=reference.unpack_int8)


def matmul_int8(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
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
    """x @ weight^T (+ bias) for a weight of 8-bit values q, packed: weight = q * scale.

    x: [..., K], any floating dtype, rows at one stride. packed: [ceil(N / 64), ceil(K / 128), 4, 128, 16] int8, from
    `pack_int8`; each row of tiles contiguous. scales: [N, K / G] in x's dtype or fp32, one for each group of G
    columns, G 32, 64, 128 or K. bias: [N] in x's dtype or None. norm, eps, residual, gated, out, deterministic: as for
    `matmul`. workspace: scratch memory from `matmul_int8_workspace`; allocated when None and needed. Returns out.
    Accumulates in fp32. Up to 64 rows (16 in fp32, 0 in fp32 on sm_100; 32 on sm_80 and sm_89) q is exact and the
    result of a row is batch-invariant, bit for bit; with more rows, a Triton kernel rounds the weight to x's dtype
    first. Where x holds an infinity, a result may be NaN in place of an infinity.
    Raises ValueError for a shape, stride or device, TypeError for a dtype; nothing is written then.
    Source: kernels/reference/int8.py.

    Example:
        >>> values, scales = kernels.quantize_int8(torch.full((2, 32), 127.0), group_size=32)
        >>> kernels.matmul_int8(torch.ones(1, 32), kernels.pack_int8(values), scales).tolist()
        [[4064.0, 4064.0]]
    """
    if out is None:
        out = torch.empty(quantized_shape(x, scales, gated), dtype=x.dtype, device=x.device)
    run = _MATMUL.by_row if deterministic else _MATMUL
    run(x, packed, scales, bias, norm, eps, residual, gated, out, workspace)
    return out


def matmul_int8_workspace(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """Scratch memory for `matmul_int8` of this x or one of fewer rows: as `matmul_int4_workspace`.

    Example:
        >>> values, scales = kernels.quantize_int8(torch.ones(2, 32), group_size=32)
        >>> packed = kernels.pack_int8(values)
        >>> kernels.matmul_int8_workspace(torch.ones(1, 32), packed, scales).shape  # a CPU needs none
        torch.Size([0])
    """
    return _MATMUL.workspace(x.device, torch.float32, x, packed, scales)


def quantize_int8(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Quantize a weight [N, K] to 8 bits, rounded to nearest. Returns (`codes`, scales); see `dequantize_int8`.

    weight: bf16, fp16, fp32 or fp64, finite. group_size: 32, 64, 128 or K, a divisor of K. `codes`: [N, K] int8, the
    largest magnitude of a group 127. scales: [N, K / group_size] in weight's dtype, that magnitude / 127.
    Raises ValueError for a shape or a value, TypeError for a dtype.
    Source: Dettmers et al., LLM.int8() (2022), absmax quantization; in groups, GGML's Q8_0.

    Example:
        >>> weight = torch.arange(-127.0, 129.0, 8)[None]  # [1, 32]
        >>> values, scales = kernels.quantize_int8(weight, group_size=32)
        >>> values[0, :3].tolist(), scales.tolist()
        ([-127, -119, -111], [[1.0]])
    """
    made: tuple[Tensor, Tensor] = _QUANTIZE(weight, group_size)
    return made


def dequantize_int8(codes: Tensor, scales: Tensor) -> Tensor:
    """The weight [N, K] of 8-bit values q: q * scale, computed in at least fp32, rounded to scales' dtype.

    `codes`: q, [N, K] int8. scales: [N, K / G], any floating dtype.
    Raises ValueError for a shape, TypeError for a dtype.

    Example:
        >>> values, scales = torch.tensor([[1, -3] * 16], dtype=torch.int8), torch.tensor([[0.5]])
        >>> kernels.dequantize_int8(values, scales)[0, :2].tolist()
        [0.5, -1.5]
    """
    weight: Tensor = _DEQUANTIZE(codes, scales)
    return weight


def pack_int8(codes: Tensor) -> Tensor:
    """Pack 8-bit values in the layout of `matmul_int8`: [ceil(N / 64), ceil(K / 128), 4, 128, 16] int8.

    `codes`: [N, K] int8. Rows and columns past N and K are padded with 0.
    Raises ValueError for a shape, TypeError for a dtype.

    Example:
        >>> kernels.pack_int8(torch.zeros(100, 256, dtype=torch.int8)).shape
        torch.Size([2, 2, 4, 128, 16])
    """
    packed: Tensor = _PACK(codes)
    return packed


def unpack_int8(packed: Tensor, rows: int, columns: int) -> Tensor:
    """The 8-bit values [rows, columns] int8 that `pack_int8` packed.

    Raises ValueError for a shape, TypeError for a dtype.

    Example:
        >>> values = torch.randint(-128, 128, (100, 256), dtype=torch.int8)
        >>> torch.equal(kernels.unpack_int8(kernels.pack_int8(values), 100, 256), values)
        True
    """
    codes: Tensor = _UNPACK(packed, rows, columns)
    return codes
