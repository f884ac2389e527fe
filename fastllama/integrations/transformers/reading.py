"""What was read of a decoder layer, its fused weights before all, and how a change of the layer is noticed."""

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

from fastllama import kernels
from fastllama.integrations.transformers.fused import Fused, fuse
from fastllama.integrations.transformers.trouble import GATE_UP, NAME, NORMS, QKV, global_hooks, hooked

_CHILDREN = itemgetter("self_attn", "mlp", *NORMS)
_OF_ATTENTION, _OF_MLP = itemgetter(*QKV, "o_proj"), itemgetter(*GATE_UP, "down_proj", "act_fn")
_WEIGHT = itemgetter("weight")
_CHOSEN = "_attn_implementation_internal"  # what config._attn_implementation reads, by way of 2 us
_OVERRIDES = "forward", "_hf_hook"
# Whose forward other libraries replace for all models of a process.
_ATTENTION, _MLP, _NORM = modeling_llama.LlamaAttention, modeling_llama.LlamaMLP, modeling_llama.LlamaRMSNorm


class Reading:
    """The fused weights of a layer, and what they were read from: a copy, and what is unpickled, has nothing read.

    matrices: the fused weights, of q, k, v and of gate and up. dtype: theirs.
    """

    def __init__(self) -> None:
        self.forget()

    def __reduce__(self) -> tuple[type[Reading], tuple[()]]:
        return Reading, ()

    def forget(self) -> None:
        """Nothing is read, and no memory held."""
        self.matrices: tuple[Fused, ...] = ()
        self.dtype: torch.dtype | None = None
        self._known: tuple[Any, ...] | None = None
        self._room = -1, 0  # rows, and numbers of scratch memory for them

    def holds(self, layer: Any) -> bool:
        """Whether the layer is as it was read: modules, their classes, attributes and hooks, and its weights.

        Of those that are fused it looks at the memory too. At every call, so in few steps of Python: 2 us.
        """
        known = self._known
        if known is None:
            return False
        settings, forwards, structure, modules, facts, overrides, owned, parameters, addresses, guards, others = known
        try:
            children = _CHILDREN(layer._modules)
            return (
                (children, _OF_ATTENTION(children[0]._modules), _OF_MLP(children[1]._modules)) == structure
                and [*map(type, modules), *map(len, facts[0])] == facts[1]
                and all(map(is_, chain.from_iterable(owned), parameters[0]))
                and [*map(Tensor.data_ptr, parameters[1])] == addresses
                and guards(*parameters[1], *map(_WEIGHT, others))
                and settings.get(_CHOSEN) == NAME
                and (_ATTENTION.forward, _MLP.forward, _NORM.forward, modeling_llama.apply_rotary_pos_emb) == forwards
                and (RemovableHandle.next_id == self._next_hook or self._no_hooks(modules))
                and not (overrides and any(each.get(name) is not value for each, name, value in overrides))
            )
        except KeyError:
            return False

    def read(self, layer: Any) -> None:
        """Fuse the weights of a layer that has no `trouble`: they are moved next to each other where they are apart."""
        attention, mlp = layer.self_attn, layer.mlp
        linears = [[getattr(attention, name) for name in QKV], [getattr(mlp, name) for name in GATE_UP]]
        others = attention.o_proj, mlp.down_proj, layer.input_layernorm, layer.post_attention_layernorm
        self.matrices = fuse(linears[0]), fuse(linears[1])
        self.dtype = attention.q_proj.weight.dtype
        structure: Any = _CHILDREN(layer._modules), _OF_ATTENTION(attention._modules), _OF_MLP(mlp._modules)
        modules = [*chain(*structure)]
        attributes = [module.__dict__ for module in modules]  # a forward of its own is one more
        owned = [linear._parameters.values() for linear in chain(*linears)]
        parameters = [*chain.from_iterable(owned)]  # weights and biases
        fused = [parameter for parameter in parameters if parameter is not None]
        weights = [*fused, *(module.weight for module in others)]
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
            (parameters, fused),
            [*map(Tensor.data_ptr, fused)],
            TensorGuards(*weights, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check,
            [module._parameters for module in others],
        )

    def _no_hooks(self, modules: Sequence[nn.Module]) -> bool:
        """Asked where a hook was registered since, on any module of the process."""
        next_hook = RemovableHandle.next_id
        if global_hooks() or any(map(hooked, modules)):
            return False
        self._next_hook = next_hook
        return True

    def room(self, num_rows: int) -> int:
        """Numbers of scratch memory for the layer's matmuls of so many rows, one at a time."""
        if self._room[0] != num_rows:  # asked anew only where the batch changes: it takes 30 us
            assert self._known is not None
            o_proj, down_proj, *_ = map(_WEIGHT, self._known[-1])
            matrices = *(weight for weight, bias in self.matrices), o_proj, down_proj
            self._room = num_rows, max(kernels.matmul_workspace(num_rows, matrix).numel() for matrix in matrices)
        return self._room[1]
