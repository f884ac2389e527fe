"""Fuses several linear layers into one of ours: their weights are adjacent in memory, spanned by one tensor.

The fused matrix shares memory with the parameters: training, loading and saving use transformers' parameters, and
writes to them change the matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from fastllama import kernels
from fastllama.kernels.dispatch.isolation import no_autocast
from fastllama.kernels.reference.int4 import ROWS
from fastllama.layers.linear import Linear, LinearBase
from fastllama.layers.quantized import LINEARS, QuantizedLinear

Given = Tensor | None
Matmul = Callable[[Tensor, Given, Given, float, Given, bool], Tensor]  # of x, workspace, norm, eps, residual, gated
Tensors = Sequence[Tensor]
# Fused tensors by address, while a layer keeps one alive, so that no other memory can have the address.
_WHOLE: dict[int, list[ReferenceType[Tensor]]] = {}

_LIBRARY = torch.library.Library("fastllama_transformers", "DEF")  # kept alive: its ops die with it
_COMMON = "Tensor[] biases, Tensor norm, float eps, bool gated, Tensor(a!) out"
_TAGS = (torch.Tag.pt2_compliant_tag,)
_LIBRARY.define(f"fused_matmul(Tensor x, Tensor[] weights, {_COMMON}) -> ()", tags=_TAGS)
_LIBRARY.define(
    f"fused_quantized(Tensor x, str kind, Tensor[] packed, Tensor[] scales, Tensor[] zeros, {_COMMON}) -> ()",
    tags=_TAGS,
)


def fuse(linears: Sequence[nn.Module]) -> LinearBase | None:
    """One layer over the memory of one or several, whose tensors are moved next to each other where needed.

    linears: nn.Linear or `linears.HF_LINEARS`, without `trouble`. They keep their tensors, which share memory with the
    layer's. None where they are not `alike`.
    """
    if not alike(linears):
        return None
    each: list[Any] = [*linears]
    first = each[0]
    bias = None if first.bias is None else _parameter([linear.bias for linear in each])
    if isinstance(first, QuantizedLinear):
        packed, scales = _adjoined([linear.packed for linear in each]), _adjoined([linear.scales for linear in each])
        zeros = None if first.zeros is None else _adjoined([linear.zeros for linear in each])
        return LINEARS[first.kind](packed, scales, first.in_features, bias, zeros)
    weight = _parameter([linear.weight for linear in each])
    layer = Linear(weight.shape[1], weight.shape[0], False, weight.dtype, "meta")
    layer.weight, layer.bias = weight, bias
    return layer


def alike(linears: Sequence[nn.Module]) -> bool:
    """Whether several linear layers can be fused: of one kind, quantized ones with a multiple of a tile's rows."""
    first, *others = map(_form, linears)
    if any(form != first for form in others):
        return False
    quantized = [linear for linear in linears[:-1] if isinstance(linear, QuantizedLinear)]
    return not any(linear.out_features % ROWS for linear in quantized)


def _form(linear: Any) -> tuple[Any, ...]:
    bias = None if linear.bias is None else linear.bias.dtype
    if isinstance(linear, QuantizedLinear):
        return *linear.form, linear.packed.device, bias
    return linear.weight.shape[1], linear.weight.dtype, linear.weight.device, bias


def joined(linears: Sequence[nn.Module]) -> LinearBase:
    """The result of `fuse`; for layers that are not alike, one that runs them in turn."""
    layer = fuse(linears)
    return Apart([joined([linear]) for linear in linears]) if layer is None else layer


class Apart(LinearBase):
    """Runs several linear layers on x and concatenates their features; without a residual."""

    def __init__(self, parts: Sequence[LinearBase]) -> None:
        super().__init__()
        self.parts: Any = nn.ModuleList(parts)

    def matmul(self, x: Tensor, workspace: Tensor | None, **options: Any) -> Tensor:
        gated = options.pop("gated")
        return _side_by_side([part.matmul(x, workspace, gated=False, **options) for part in self.parts], gated)

    def workspace(self, num_rows: int, dtype: torch.dtype) -> Tensor:
        return max((part.workspace(num_rows, dtype) for part in self.parts), key=Tensor.numel)


def _side_by_side(parts: Tensors, gated: bool) -> Tensor:
    whole = torch.cat([*parts], -1)
    return kernels.silu_mul(whole) if gated else whole


def matmul_of(layer: LinearBase) -> Matmul:
    """A layer's matmul, bound to its plain tensors: to look each of them up in a module takes 0.4 us a call."""
    if isinstance(layer, Linear):
        return partial(_dense, layer.weight, layer.bias)
    for module in layer.modules():
        module.__dict__.update(module._parameters | module._buffers)
    return partial(_any, layer)


def _dense(
    weight: Tensor, bias: Given, x: Tensor, workspace: Given, norm: Given, eps: float, residual: Given, gated: bool
) -> Tensor:
    return kernels.matmul(x, weight, bias, norm=norm, eps=eps, residual=residual, gated=gated, workspace=workspace)


def _any(
    layer: LinearBase, x: Tensor, workspace: Given, norm: Given, eps: float, residual: Given, gated: bool
) -> Tensor:
    return layer.matmul(x, workspace, norm=norm, eps=eps, residual=residual, gated=gated, out=None)


def in_graph(
    linears: Sequence[Any], x: Tensor, workspace: Given, norm: Given, eps: float, residual: Given, gated: bool
) -> Tensor:
    """The matmul of several layers in torch.compile's graph.

    An op receives the separate tensors at each call, so that CUDA graphs treat them as static inputs, and fuses them
    itself.
    """
    first = linears[0]
    quantized = isinstance(first, QuantizedLinear)
    if len(linears) == 1:
        if quantized:
            return _any(first, x, workspace, norm, eps, residual, gated)
        return _dense(first.weight, first.bias, x, workspace, norm, eps, residual, gated)
    if not alike(linears):
        parts = [in_graph([linear], x, workspace, norm, eps, residual, False) for linear in linears]
        return _side_by_side(parts, gated)
    features = sum(linear.out_features for linear in linears)
    out = x.new_empty(*x.shape[:-1], features // 2 if gated else features)
    biases = [linear.bias for linear in linears if linear.bias is not None]
    ops = torch.ops.fastllama_transformers
    if quantized:
        packed, scales = [linear.packed for linear in linears], [linear.scales for linear in linears]
        zeros = [linear.zeros for linear in linears if linear.zeros is not None]
        ops.fused_quantized(x, first.kind, packed, scales, zeros, biases, norm, eps, gated, out)
    else:
        ops.fused_matmul(x, [linear.weight for linear in linears], biases, norm, eps, gated, out)
    return out


def _matmul(x: Tensor, weights: Tensors, biases: Tensors, norm: Tensor, eps: float, gated: bool, out: Tensor) -> None:
    kernels.matmul(x, _rows(weights), _rows(biases) if biases else None, norm=norm, eps=eps, gated=gated, out=out)


def _quantized(
    x: Tensor,
    kind: str,
    packed: Tensors,
    scales: Tensors,
    zeros: Tensors,
    biases: Tensors,
    norm: Tensor,
    eps: float,
    gated: bool,
    out: Tensor,
) -> None:
    layer: Any = SimpleNamespace(  # what `matmul` reads; to construct a module takes longer than a small matmul
        packed=_rows(packed),
        scales=_rows(scales),
        zeros=_rows(zeros) if zeros else None,
        bias=_rows(biases) if biases else None,
    )
    LINEARS[kind].matmul(layer, x, None, norm=norm, eps=eps, residual=None, gated=gated, out=out)


for _name, _function in (("fused_matmul", _matmul), ("fused_quantized", _quantized)):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastllama_transformers::{_name}", lambda *args: None, lib=_LIBRARY)


def _rows(tensors: Tensors) -> Tensor:
    """The fused tensor; a copy where a parameter was moved or replaced since the graph was compiled."""
    whole = spanning(tensors)
    return _concatenated(tensors) if whole is None else whole


def _concatenated(tensors: Tensors) -> Tensor:
    with no_autocast():  # under autocast, torch.cat of fp16 raises
        return torch.cat([*tensors])


def _parameter(tensors: Tensors) -> nn.Parameter:
    return _adjoined(tensors, lambda whole: nn.Parameter(whole, requires_grad=False))


def _adjoined(tensors: Tensors, make: Callable[[Tensor], Any] = Tensor.detach) -> Any:
    """A new tensor object over all rows, made adjacent if needed: converting one layer must not affect another."""
    with torch.inference_mode(tensors[0].is_inference()), torch.no_grad():
        if len(tensors) == 1:
            return make(tensors[0].detach())
        whole = spanning(tensors)
        if whole is None:
            whole = _concatenated([part.detach() for part in tensors])
            for part, piece in zip(tensors, whole.split([len(part) for part in tensors]), strict=True):
                # A separate storage over the same memory: libraries that save weights take two tensors with one
                # storage for aliases, and drop the second.
                part.data = from_dlpack(piece)
        made = make(whole.detach())
    _remember(made)
    return made


def _remember(whole: Tensor) -> None:
    address, known = whole.data_ptr(), _WHOLE

    def forget(dead: ReferenceType[Tensor]) -> None:
        known[address].remove(dead)
        if not known[address]:
            del known[address]

    known.setdefault(address, []).append(ref(whole, forget))


def spanning(tensors: Tensors) -> Tensor | None:
    """The fused tensor whose rows are exactly these tensors, in order; else None."""
    for known in [*_WHOLE.get(tensors[0].data_ptr(), ())]:
        whole = known()
        if whole is not None and _spans(whole, tensors):
            return whole
    return None


def _spans(whole: Tensor, tensors: Tensors) -> bool:
    end = whole.data_ptr()
    if whole.nbytes != sum(part.nbytes for part in tensors):
        return False
    for part in tensors:
        if part.data_ptr() != end or part.dtype != whole.dtype or part.shape[1:] != whole.shape[1:]:
            return False
        end += part.nbytes
    return True
