"""matmul and embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllama.errors import check_shape
from fastllama.kernels import cpu, reference
from fastllama.kernels.dispatch.checks import (
    FLOATS,
    INTEGERS,
    check_elements,
    check_matmul,
    check_tensor,
    check_workspace,
    matmul_shape,
)
from fastllama.kernels.dispatch.fusion import Fusion
from fastllama.kernels.dispatch.op import Op
from fastllama.kernels.ops import values
from fastllama.kernels.ops.compiled import numba_kernels, triton_kernels
from fastllama.kernels.ops.matmul_op import MatmulOp


def _check_matmul(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    fusion: Fusion,
    out: Tensor,
    workspace: Tensor | None,
) -> None:
    _result_shape(x, weight, fusion.gated)
    check_elements("weight", weight, (x.dtype,))
    check_matmul(x, weight.shape[0], bias, fusion, out)
    check_workspace(workspace, torch.float32)


def _result_shape(x: Tensor, weight: Tensor, gated: bool) -> tuple[int, ...]:
    *leading, size = x.shape or (None,)
    if size is None:
        raise ValueError("x has shape []; legal: [..., K]")
    matrix = weight.shape
    if len(matrix) != 2 or matrix[1] != size:
        check_shape("weight", weight, ("N", size))
    return matmul_shape(leading, matrix[0], gated)


def _check_embedding(ids: Tensor, weight: Tensor, out: Tensor) -> None:
    shape = _rows_shape(ids, weight)
    check_elements("ids", ids, INTEGERS)
    check_elements("weight", weight, FLOATS)
    check_tensor("out", out, shape, (weight.dtype,))


def _rows_shape(ids: Tensor, weight: Tensor) -> tuple[int, int]:
    rows, table = ids.shape, weight.shape
    if len(rows) != 1 or len(table) != 2:
        check_shape("ids", ids, ("T",))
        check_shape("weight", weight, ("V", "H"))
    return rows[0], table[1]


_MATMUL = MatmulOp(
    "matmul",
    "Tensor weight",
    check=_check_matmul,
    reference=reference.matmul,
    cpu=cpu.matmul,
    numba=numba_kernels,
    triton=triton_kernels,
)
_EMBEDDING = Op(
    "embedding(Tensor ids, Tensor weight, Tensor(a!) out) -> ()",
    check=_check_embedding,
    reference=reference.embedding,
    values=values.check_embedding,
    triton=triton_kernels,
)


def matmul(
    x: Tensor,
    weight: Tensor,
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
    """x @ weight^T (+ bias): a linear layer, and what stands before and behind it in a Llama's block.

    x: [..., K], weight: [N, K] (rows are output features, as torch.nn.Linear keeps them), bias: [N] or None; one
    floating dtype, last dimension contiguous, rows at one stride.
    norm, eps: x is `rms_norm(x, norm, eps)` first; norm: [K] in x's dtype or fp32.
    gated: the weight is [gate | up], and out is silu(gate) * up: [..., N / 2].
    residual: like out, added; may be out itself. None where gated.
    out: [..., N], of memory of its own otherwise; allocated when None. Returns out.
    workspace: scratch memory of `matmul_workspace` for as many rows or more; allocated when None and needed.
    deterministic: a row's result is the same, bit for bit, whatever the other rows, and however many: rows are
    multiplied a few at a time (64 where a Triton kernel runs, else 1), each time with the weight read anew.
    Accumulates in fp32. What is between x and out may be rounded to x's dtype or not; a Triton kernel of few rows
    multiplies by the norm's factor last (docs/design/numerics.md).
    Raises ValueError for a shape, stride or device, TypeError for a dtype; nothing is written then.
    Source: y = x W^T + b; `rms_norm`, `silu_mul`.
    """
    if out is None:
        out = torch.empty(_result_shape(x, weight, gated), dtype=x.dtype, device=x.device)
    run = _MATMUL.by_row if deterministic else _MATMUL
    run(x, weight, bias, norm, eps, residual, gated, out, workspace)
    return out


def matmul_workspace(num_rows: int, weight: Tensor) -> Tensor:
    """Scratch memory for `matmul` of so many rows or fewer by a weight [N, K], kept from call to call: [E] fp32.

    Where a Triton kernel runs and reads the weight's columns in parts, N numbers for each of 64 rows at most and each
    part, and 4096 zeros in front, which are zeros again after each call; nothing elsewhere. Other products that take
    such memory may use the same. Not to be shared by calls that overlap.
    """
    return _MATMUL.workspace(weight.device, torch.float32, num_rows, weight)


def embedding(ids: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Rows of the embedding table: weight[ids].

    ids: [T] int32 or int64, each in [0, V). weight: [V, H], any floating dtype. out: [T, H]; allocated when None.
    Returns out. Raises ValueError for a shape, stride or device, TypeError for a dtype; nothing is written then.
    Ids are not read on the host: one outside of the table gives NaN.
    Source: table lookup.
    """
    if out is None:
        out = torch.empty(_rows_shape(ids, weight), dtype=weight.dtype, device=weight.device)
    _EMBEDDING(ids, weight, out)
    return out
