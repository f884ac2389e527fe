"""matmul and embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllama.errors import check_dtype, check_rows, check_shape
from fastllama.kernels import cpu, reference
from fastllama.kernels.op import Op

_MATMUL = Op(
    "matmul(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out) -> ()", reference=reference.matmul, cpu=cpu.matmul
)
_EMBEDDING = Op("embedding(Tensor ids, Tensor weight, Tensor(a!) out) -> ()", reference=reference.embedding)


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """x @ weight^T (+ bias): a linear layer, and the logits when weight is the output embedding.

    x: [..., K], weight: [N, K] (rows are output features, as torch.nn.Linear keeps them), bias: [N] or None; one
    floating dtype. out: [..., N]; allocated when None. Returns out. Accumulates in fp32 and rounds once.
    Raises ValueError for a shape or stride, TypeError for a dtype.
    Source: y = x W^T + b.
    """
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        check_shape("weight", weight, ("N", x.shape[-1] if x.dim() else "K"))
        raise ValueError(f"x has shape {list(x.shape)}; legal: [..., K]")
    if weight.dtype != x.dtype:
        check_dtype("weight", weight, (x.dtype,))
    check_rows("x", x)
    if bias is not None:
        check_shape("bias", bias, weight.shape[:1])
        check_dtype("bias", bias, (x.dtype,))
    if out is None:
        out = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)
    else:
        check_shape("out", out, (*x.shape[:-1], weight.shape[0]))
        check_dtype("out", out, (x.dtype,))
    _MATMUL(x, weight, bias, out)
    return out


def embedding(ids: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Rows of the embedding table: weight[ids].

    ids: [T] int32 or int64, each in [0, V). weight: [V, H]. out: [T, H]; allocated when None. Returns out.
    Raises ValueError for a shape, TypeError for a dtype. Ids are not read on the host: the caller checks their range.
    Source: table lookup.
    """
    check_shape("ids", ids, ("T",))
    check_dtype("ids", ids, (torch.int32, torch.int64))
    check_shape("weight", weight, ("V", "H"))
    shape = (ids.shape[0], weight.shape[1])
    if out is None:
        out = torch.empty(shape, dtype=weight.dtype, device=weight.device)
    else:
        check_shape("out", out, shape)
        check_dtype("out", out, (weight.dtype,))
    _EMBEDDING(ids, weight, out)
    return out
