"""The ops matmul and embedding."""

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
    """A linear layer, x @ weight^T (+ bias), fused with the RMSNorm before it and the residual sum or SwiGLU after it.

    x: [..., K], weight: [N, K] (rows are output features, as torch.nn.Linear keeps them), bias: [N] or None; one
    floating dtype, last dimension contiguous, rows at one stride.
    norm, eps: x is `rms_norm(x, norm, eps)` first; norm: [K] in x's dtype or fp32.
    gated: the weight is [gate | up], and out is silu(gate) * up: [..., N / 2].
    residual: like out, added; may be out itself. None where gated.
    out: [..., N], otherwise not an alias of an argument; allocated when None. Returns out.
    workspace: scratch memory from `matmul_workspace` for as many rows or more; allocated when None and needed.
    deterministic: batch-invariant, bit for bit: blocks of rows (64 where a Triton kernel runs, else 1) are multiplied
    one after another, and each block reads the whole weight.
    Accumulates in fp32. Intermediate results may or may not be rounded to x's dtype; for few rows, a Triton kernel
    applies the norm's factor after the matmul (docs/design/numerics.md).
    Raises ValueError for a shape, stride or device, TypeError for a dtype; nothing is written then.
    Source: y = x W^T + b; `rms_norm`, `silu_mul`.

    Example:
        >>> x, weight = torch.ones(1, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> kernels.matmul(x, weight).tolist()
        [[3.0, 7.0]]
        >>> kernels.matmul(x, weight, residual=x).tolist()
        [[4.0, 8.0]]
    """
    if out is None:
        out = torch.empty(_result_shape(x, weight, gated), dtype=x.dtype, device=x.device)
    run = _MATMUL.by_row if deterministic else _MATMUL
    run(x, weight, bias, norm, eps, residual, gated, out, workspace)
    return out


def matmul_workspace(num_rows: int, weight: Tensor) -> Tensor:
    """Scratch memory for `matmul` of up to num_rows rows by a weight [N, K], reused from call to call: [E] fp32.

    Where a Triton kernel runs with split-K: 4096 counters, which every call leaves at zero, then N numbers for each row
    (64 at most) and each split. Empty elsewhere. Other matmuls that take a workspace may use the same one. Not to be
    shared by overlapping calls.

    Example:
        >>> kernels.matmul_workspace(1, torch.ones(2, 2)).shape  # a CPU needs none
        torch.Size([0])
    """
    return _MATMUL.workspace(weight.device, torch.float32, num_rows, weight)


def embedding(ids: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Look up rows of the embedding table: weight[ids].

    ids: [T] int32 or int64, each in [0, V). weight: [V, H], any floating dtype. out: [T, H]; allocated when None.
    Returns out. Raises ValueError for a shape, stride or device, TypeError for a dtype; nothing is written then.
    Ids are not read on the host: an id outside of the table returns a row of NaN.
    Source: table lookup.

    Example:
        >>> weight = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])
        >>> kernels.embedding(torch.tensor([2, 0]), weight).tolist()
        [[4.0, 5.0], [0.0, 1.0]]
    """
    if out is None:
        out = torch.empty(_rows_shape(ids, weight), dtype=weight.dtype, device=weight.device)
    _EMBEDDING(ids, weight, out)
    return out
