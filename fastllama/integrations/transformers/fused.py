"""Several linear layers as one matmul: their weights lie one after another in memory, which one tensor spans.

The fused matrix is no copy beside the parameters: what trains, loads or saves one finds it where transformers put it,
and what is written to it is in the matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from fastllama import kernels
from fastllama.kernels.dispatch.isolation import no_autocast

Fused = tuple[Any, Any]  # weight [N, K] and bias [N] or None, or lists of the parts of each
# Fused tensors by their address, while a layer holds them: so long no other memory can have it.
_WHOLE: WeakValueDictionary[int, Tensor] = WeakValueDictionary()

_LIBRARY = torch.library.Library("fastllama_transformers", "DEF")  # kept alive: its op dies with it
_LIBRARY.define(
    "fused_matmul(Tensor x, Tensor[] weights, Tensor[] biases, Tensor norm, float eps, bool gated, Tensor(a!) out) "
    "-> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def fused_matmul(x: Tensor, fused: Fused, norm: Any, *, gated: bool = False, workspace: Tensor | None = None) -> Tensor:
    """`kernels.matmul` of norm(x) [..., K]; fused: from `fuse`, or in torch.compile's graph from `parts`.

    In the graph an op takes the parameters as they are at each call, which CUDA graphs then take for static inputs,
    and joins them itself. norm: a LlamaRMSNorm.
    """
    weight, bias = fused
    norm_weight, eps = norm._parameters["weight"], norm.variance_epsilon
    if isinstance(weight, Tensor):
        return kernels.matmul(x, weight, bias, norm=norm_weight, eps=eps, gated=gated, workspace=workspace)
    features = sum(part.shape[0] for part in weight)
    out = x.new_empty(*x.shape[:-1], features // 2 if gated else features)
    torch.ops.fastllama_transformers.fused_matmul(x, weight, bias, norm_weight, eps, gated, out)
    return out


def _compiled(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], norm: Tensor, eps: float, gated: bool, out: Tensor
) -> None:
    bias = _joined(biases) if biases else None
    kernels.matmul(x, _joined(weights), bias, norm=norm, eps=eps, gated=gated, out=out)


_LIBRARY.impl("fused_matmul", _compiled, "CompositeExplicitAutograd")
torch.library.register_fake("fastllama_transformers::fused_matmul", lambda *args: None, lib=_LIBRARY)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """All their rows: a copy where a parameter was moved or replaced since the graph was compiled."""
    whole = spanning(tensors)
    return _concatenated(tensors) if whole is None else whole


def _concatenated(tensors: Sequence[Tensor]) -> Tensor:
    with no_autocast():  # where torch.cat of fp16 raises
        return torch.cat([*tensors])


def parts(owner: nn.Module, names: Sequence[str]) -> Fused:
    """The parameters of linear layers, as they are."""
    linears: list[Any] = [owner._modules[name] for name in names]
    return [linear.weight for linear in linears], [linear.bias for linear in linears if linear.bias is not None]


def fuse(linears: Sequence[nn.Linear]) -> Fused:
    """One weight [N, K] and bias [N] over the memory of several, which are moved together where they are apart."""
    with torch.inference_mode(linears[0].weight.is_inference()), torch.no_grad():
        weight = _adjoined([linear.weight for linear in linears])
        return weight, None if linears[0].bias is None else _adjoined([linear.bias for linear in linears])


def _adjoined(tensors: Sequence[Tensor]) -> Tensor:
    whole = spanning(tensors)
    if whole is None:
        whole = _concatenated([part.detach() for part in tensors])
        for part, piece in zip(tensors, whole.split([len(part) for part in tensors]), strict=True):
            # A storage of its own over the same memory: libraries that save weights take two tensors of one storage
            # for two names of one, and drop the second.
            part.data = from_dlpack(piece)
        _WHOLE[whole.data_ptr()] = whole
    return whole


def spanning(tensors: Sequence[Tensor]) -> Tensor | None:
    """What `fuse` made, if the tensors are its rows in their order; else None."""
    end = tensors[0].data_ptr()
    whole = _WHOLE.get(end)
    if whole is None or whole.nbytes != sum(part.nbytes for part in tensors):
        return None
    for part in tensors:
        if part.data_ptr() != end or part.dtype != whole.dtype:
            return None
        end += part.nbytes
    return whole
