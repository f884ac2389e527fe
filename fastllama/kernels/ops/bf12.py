"""The op matmul_bf12, and packing and unpacking of its weights."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllama.errors import check_range, check_shape
from fastllama.kernels import reference
from fastllama.kernels.dispatch.checks import check_elements, check_matmul, check_tensor, matmul_shape
from fastllama.kernels.dispatch.conversion import Conversion
from fastllama.kernels.dispatch.fusion import Fusion
from fastllama.kernels.ops.compiled import numba_kernels
from fastllama.kernels.ops.matmul_op import MatmulOp
from fastllama.kernels.reference.bf12 import BLOCK, BLOCK_BYTES, LARGEST_EXPONENT


def _check(
    x: Tensor,
    codes: Tensor,
    outliers: Tensor,
    exponent: int,
    bias: Tensor | None,
    fusion: Fusion,
    out: Tensor,
) -> None:
    _result_shape(x, codes, fusion.gated)
    _check_packed(codes, outliers, exponent)
    check_matmul(x, codes.shape[0], bias, fusion, out)


def _check_packed(codes: Tensor, outliers: Tensor, exponent: int) -> None:
    if codes.dim() != 2 or codes.shape[1] % BLOCK_BYTES:
        raise ValueError(f"codes has shape {list(codes.shape)}; legal: [N, K * 3 / 2], K a multiple of {BLOCK}")
    check_elements("codes", codes, (torch.uint8,))
    check_tensor("outliers", outliers, (*outliers.shape[:1], 3), (torch.int32,))
    check_range("exponent", exponent, 1, LARGEST_EXPONENT)


def _check_pack(weight: Tensor) -> None:
    if weight.dim() != 2 or weight.shape[1] % BLOCK:
        raise ValueError(f"weight has shape {list(weight.shape)}; legal: [N, K], K a multiple of {BLOCK}")
    check_elements("weight", weight, (torch.bfloat16,))


def _result_shape(x: Tensor, codes: Tensor, gated: bool) -> tuple[int, ...]:
    *leading, size = x.shape or (None,)
    if size is None or size % BLOCK:
        raise ValueError(f"x has shape {list(x.shape)}; legal: [..., K], K a multiple of {BLOCK}")
    rows = codes.shape
    if len(rows) != 2 or rows[1] != size // BLOCK * BLOCK_BYTES:
        check_shape("codes", codes, ("N", size // BLOCK * BLOCK_BYTES))
    return matmul_shape(leading, rows[0], gated)


_MATMUL = MatmulOp(
    "matmul_bf12",
    "Tensor codes, Tensor outliers, int exponent",
    check=_check,
    reference=reference.matmul_bf12,
    numba=numba_kernels,
)
_PACK = Conversion(check=_check_pack, reference=reference.pack_bf12, numba=numba_kernels)
_UNPACK = Conversion(check=_check_packed, reference=reference.unpack_bf12)


def matmul_bf12(
    x: Tensor,
    codes: Tensor,
    outliers: Tensor,
    exponent: int,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    gated: bool = False,
    out: Tensor | None = None,
    deterministic: bool = False,
) -> Tensor:
    """`matmul` by a bf16 weight that `pack_bf12` packed into 12 bits without loss.

    x: [..., K], K a multiple of 64. `codes`: [N, K * 3 / 2] uint8, outliers: [M, 3] int32 and exponent, 1 to 127: from
    `pack_bf12`. bias: [N] in x's dtype or None. norm, eps, residual, gated, out, deterministic: as for `matmul`.
    Returns out.
    Accumulates in fp32 from the exact weights; where x holds an infinity, a result may be NaN in place of an infinity.
    Raises ValueError for a shape, stride or device, TypeError for a dtype; nothing is written then. The rows and
    columns in outliers are not checked.
    Source: kernels/reference/bf12.py.

    Example:
        >>> x, weight = torch.ones(1, 64, dtype=torch.bfloat16), torch.ones(2, 64, dtype=torch.bfloat16)
        >>> kernels.matmul_bf12(x, *kernels.pack_bf12(weight)).tolist()
        [[64.0, 64.0]]
    """
    if out is None:
        out = torch.empty(_result_shape(x, codes, gated), dtype=x.dtype, device=x.device)
    run = _MATMUL.by_row if deterministic else _MATMUL
    run(x, codes, outliers, exponent, bias, norm, eps, residual, gated, out)
    return out


def pack_bf12(weight: Tensor) -> tuple[Tensor, Tensor, int]:
    """Pack a bf16 weight [N, K], K a multiple of 64, into 12 bits a value, without loss.

    Returns (`codes`, outliers, exponent). `codes`: [N, K * 3 / 2] uint8. outliers: [M, 3] int32, row, column and fp32
    bits of each value outside of the packed exponents: one in ten thousand of a trained or random Llama, at 12 bytes
    each. `unpack_bf12` restores every bit. Raises ValueError for a shape, TypeError for a dtype.

    Example:
        >>> weight = torch.ones(2, 64, dtype=torch.bfloat16)
        >>> packed, outliers, exponent = kernels.pack_bf12(weight)
        >>> weight.nbytes, packed.nbytes + outliers.nbytes
        (256, 192)
    """
    packed: tuple[Tensor, Tensor, int] = _PACK(weight)
    return packed


def unpack_bf12(codes: Tensor, outliers: Tensor, exponent: int) -> Tensor:
    """The bf16 weight [N, K] that `pack_bf12` packed, bit for bit. Raises as `matmul_bf12` for the packed weight.

    Example:
        >>> weight = torch.randn(2, 64).bfloat16()
        >>> torch.equal(kernels.unpack_bf12(*kernels.pack_bf12(weight)), weight)
        True
    """
    weight: Tensor = _UNPACK(codes, outliers, exponent)
    return weight
