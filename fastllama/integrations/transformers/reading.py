"""Caches a decoder layer's fused linear layers, and detects changes of the layer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.guards import TensorGuards
from torch.utils.hooks import RemovableHandle
from transformers.models.llama import modeling_llama

from fastllama.integrations.transformers.fused import Matmul, joined, matmul_of
from fastllama.integrations.transformers.trouble import GATE_UP, NAME, NORMS, QKV, global_hooks, hooked
from fastllama.layers.linear import LinearBase

_CHILDREN = itemgetter("self_attn", "mlp", *NORMS)
_OF_ATTENTION, _OF_MLP = itemgetter(*QKV, "o_proj"), itemgetter(*GATE_UP, "down_proj", "act_fn")
_CHOSEN = "_attn_implementation_internal"  # the attribute of the property config._attn_implementation, which takes 2 us
_OVERRIDES = "forward", "_hf_hook", "bias"  # "bias": where a quantized layer has no parameter of that name
# Classes whose forward other libraries replace for all models of a process.
_ATTENTION, _MLP, _NORM = modeling_llama.LlamaAttention, modeling_llama.LlamaMLP, modeling_llama.LlamaRMSNorm


def linears_of(layer: Any) -> list[list[nn.Module]]:
    """The linear layers of each of a decoder layer's four matmuls, in order."""
    attention, mlp = layer._modules["self_attn"]._modules, layer._modules["mlp"]._modules
    qkv, gate_up = [attention[name] for name in QKV], [mlp[name] for name in GATE_UP]
    return [qkv, [attention["o_proj"]], gate_up, [mlp["down_proj"]]]


class Reading:
    """The fused matmuls of a layer, and the state of the layer that they were read from. Copies begin empty.

    linears, matmuls: of q, k and v, of o, of gate and up, and of down. dtype: that of the residual stream.
    """

    def __init__(self) -> None:
        self.forget()

    def __reduce__(self) -> tuple[type[Reading], tuple[()]]:
        return Reading, ()

    def forget(self) -> None:
        """Drop everything read, and release its memory."""
        self.matmuls: tuple[Matmul, ...] = ()
        self.dtype: torch.dtype | None = None
        self.linears: tuple[LinearBase, ...] = ()
        self._known: tuple[Any, ...] | None = None
        self._room = -1, 0  # rows, and elements of scratch memory for them

    def holds(self, layer: Any) -> bool:
        """Whether the layer is unchanged since `read`: modules, their classes, attributes and hooks, and weights.

        Weights are compared by address too. Runs at every call, so it takes few Python operations: 2 us.
        """
        known = self._known
        if known is None:
            return False
        settings, forwards, structure, modules, facts, overrides, owned, tensors, addresses, guards = known
        try:
            children = _CHILDREN(layer._modules)
            return (
                (children, _OF_ATTENTION(children[0]._modules), _OF_MLP(children[1]._modules)) == structure
                and [*map(type, modules), *map(len, facts[0])] == facts[1]
                and all(map(is_, chain.from_iterable(owned), tensors[0]))
                and [*map(Tensor.data_ptr, tensors[1])] == addresses
                and guards(*tensors[1])
                and settings.get(_CHOSEN) == NAME
                and (_ATTENTION.forward, _MLP.forward, _NORM.forward, modeling_llama.apply_rotary_pos_emb) == forwards
                and (RemovableHandle.next_id == self._next_hook or self._no_hooks(modules))
                and not (overrides and any(each.get(name) is not value for each, name, value in overrides))
            )
        except KeyError:
            return False

    def read(self, layer: Any) -> None:
        """Fuse the weights of a layer without `trouble`, moving them next to each other where needed."""
        attention, mlp = layer.self_attn, layer.mlp
        linears = linears_of(layer)
        self.linears = (*map(joined, linears),)
        self.matmuls = (*map(matmul_of, self.linears),)
        self.dtype = layer.input_layernorm.weight.dtype
        structure: Any = _CHILDREN(layer._modules), _OF_ATTENTION(attention._modules), _OF_MLP(mlp._modules)
        modules = [*chain(*structure)]
        attributes = [module.__dict__ for module in modules]  # an instance's own forward adds one
        norms = [layer._modules[name] for name in NORMS]
        owned = [module._parameters.values() for module in (*chain(*linears), *norms)]
        owned += [linear._buffers.values() for linear in chain(*linears) if linear._buffers]
        everything = [*chain.from_iterable(owned)]
        weights = [tensor for tensor in everything if tensor is not None]
        sizes: list[Any] = [list(tensor.shape) for tensor in weights]
        strides: list[Any] = [list(tensor.stride()) for tensor in weights]
        self._next_hook = RemovableHandle.next_id
        self._known = (
            attention.config.__dict__,
            (_ATTENTION.forward, _MLP.forward, _NORM.forward, modeling_llama.apply_rotary_pos_emb),
            structure,
            modules,
            (attributes, [*map(type, modules), *map(len, attributes)]),
            [(each, name, each[name]) for each in attributes for name in _OVERRIDES if name in each],
            owned,
            (everything, weights),
            [*map(Tensor.data_ptr, weights)],
            TensorGuards(*weights, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check,
        )

    def _no_hooks(self, modules: Sequence[nn.Module]) -> bool:
        """Whether these modules have no hooks; checked after a hook was registered on any module of the process."""
        next_hook = RemovableHandle.next_id
        if global_hooks() or any(map(hooked, modules)):
            return False
        self._next_hook = next_hook
        return True

    def room(self, num_rows: int) -> int:
        """Elements of scratch memory for any one of the layer's matmuls of num_rows rows."""
        if self._room[0] != num_rows:  # recomputed only when the batch changes: it takes 30 us
            assert self.dtype is not None
            needed = [linear.workspace(num_rows, self.dtype).numel() for linear in self.linears]
            self._room = num_rows, max(needed)
        return self._room[1]
