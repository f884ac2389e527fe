"""matmul and embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllama.errors import check_shape
from fastllama.kernels import cpu, reference
from fastllama.kernels.checks import FLOATS, INTEGERS, check_elements, check_tensor
from fastllama.kernels.op import Op

_MATMUL = Op(
    "matmul(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out) -> ()",
    reference=reference.matmul,
    cpu=cpu.matmul,
    numba="matmul:matmul",
)
_EMBEDDING = Op("embedding(Tensor ids, Tensor weight, Tensor(a!) out) -> ()", reference=reference.embedding)


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """x @ weight^T (+ bias): a linear layer, and the logits when weight is the output embedding.

    x: [..., K], weight: [N, K] (rows are output features, as torch.nn.Linear keeps them), bias: [N] or None; one
    floating dtype, last dimension contiguous, rows at one stride. out: [..., N]; allocated when None. Returns out.
    Accumulates in fp32; a bias is added before or after the rounding.
    Raises ValueError for a shape, stride or device, TypeError for a dtype; nothing is written then.
    Source: y = x W^T + b.
    """
    *leading, size = x.shape or (None,)
    if size is None:
        raise ValueError("x has shape []; legal: [..., K]")
    matrix, dtype = weight.shape, (x.dtype,)
    if len(matrix) != 2 or matrix[1] != size:
        check_shape("weight", weight, ("N", size))
    check_elements("x", x, FLOATS)
    check_elements("weight", weight, dtype)
    if bias is not None:
        check_tensor("bias", bias, matrix[:1], dtype)
    shape = (*leading, matrix[0])
    if out is None:
        out = torch.empty(shape, dtype=x.dtype, device=x.device)
    else:
        check_tensor("out", out, shape, dtype)
    _MATMUL(x, weight, bias, out)
    return out


def embedding(ids: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Rows of the embedding table: weight[ids].

    ids: [T] int32 or int64, each in [0, V). weight: [V, H], any floating dtype. out: [T, H]; allocated when None.
    Returns out. Raises ValueError for a shape, stride or device, TypeError for a dtype; nothing is written then.
    Ids are not read on the host: the caller checks their range.
    Source: table lookup.
    """
    if ids.dim() != 1 or weight.dim() != 2:
        check_shape("ids", ids, ("T",))
        check_shape("weight", weight, ("V", "H"))
    shape = (ids.shape[0], weight.shape[1])
    check_elements("ids", ids, INTEGERS)
    check_elements("weight", weight, FLOATS)
    if out is None:
        out = torch.empty(shape, dtype=weight.dtype, device=weight.device)
    else:
        check_tensor("out", out, shape, (weight.dtype,))
    _EMBEDDING(ids, weight, out)
    return out
