"""What a decoder layer must be to run on our ops, what they take of it, and how a change of the layer is noticed."""

from __future__ import annotations

from itertools import chain
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.guards import TensorGuards
from torch.utils.hooks import RemovableHandle
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama

from fastllama import kernels
from fastllama.integrations.transformers.fused import Fused, fuse
from fastllama.integrations.transformers.norm import LlamaRMSNorm

NAME = "fastllama"  # of our attention and our masks in transformers' registries
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
_ATTENTION_LINEARS, _MLP_LINEARS = (*QKV, "o_proj"), (*GATE_UP, "down_proj")
_CHILDREN = itemgetter("self_attn", "mlp", *NORMS)
_OF_ATTENTION, _OF_MLP = itemgetter(*_ATTENTION_LINEARS), itemgetter(*_MLP_LINEARS, "act_fn")
_CHOSEN = "_attn_implementation_internal"  # what config._attn_implementation reads, by way of 2 us
# Hooks of transformers' own, by which it collects hidden states: they do nothing to what a module computes.
_COLLECTS = ("transformers.utils.output_capturing", "transformers.utils.generic")


def trouble(layer: Any) -> str | None:
    """Why a LlamaDecoderLayer cannot run on our ops, in a few words; None where it can.

    What torch.compile traces of this becomes guards: a compiled layer is compiled anew when an answer changes.
    """
    attention, mlp = layer.self_attn, layer.mlp
    if type(attention) is not modeling_llama.LlamaAttention or type(mlp) is not modeling_llama.LlamaMLP:
        return f"it consists of {_kind(attention)} and {_kind(mlp)}"
    first = attention.q_proj.weight if type(attention.q_proj) is nn.Linear else None
    linears: tuple[tuple[Any, tuple[str, ...]], ...] = (attention, _ATTENTION_LINEARS), (mlp, _MLP_LINEARS)
    for owner, names in linears:
        for name in names:
            linear = getattr(owner, name)
            if type(linear) is not nn.Linear:
                return f"{name} is a {_kind(linear)}"
            if (reason := _weight_trouble(linear.weight, first)) or (
                linear.bias is not None and (reason := _weight_trouble(linear.bias, first))
            ):
                return f"{name}'s {reason}"
            if linear.weight.shape != (linear.out_features, linear.in_features):
                return f"{name}'s weight has shape {list(linear.weight.shape)}"
    for owner, fused in ((attention, QKV), (mlp, GATE_UP)):
        if len({getattr(owner, name).bias is None for name in fused}) > 1:
            return f"only some of {', '.join(fused)} have a bias"
    for name in NORMS:
        norm = getattr(layer, name)
        if type(norm) not in (modeling_llama.LlamaRMSNorm, LlamaRMSNorm):
            return f"{name} is a {_kind(norm)}"
        if reason := _weight_trouble(norm.weight, first):
            return f"{name}'s {reason}"
    if type(mlp.act_fn) not in (SiLUActivation, nn.SiLU):
        return f"its activation is {_kind(mlp.act_fn)}"
    norms = layer.input_layernorm, layer.post_attention_layernorm
    for module in (attention, mlp, *norms, *attention.children(), *mlp.children()):
        if reason := hooked(module):
            return f"a {type(module).__name__} in it has {reason}"
    return None


def hooked(module: nn.Module) -> str | None:
    """What would be passed over where a module's weights are used and the module is not called; None if nothing."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for hook in hooks.values():
            if not _collects(hook):
                return "a hook"
    return overridden(module)


def overridden(module: nn.Module) -> str | None:
    """What stands between a module and its class's forward; None where nothing does.

    A hook of accelerate that only moves what a module is called with to the module's device may be passed over.
    """
    if (hook := module.__dict__.get("_hf_hook")) is not None:
        moves = type(hook).__name__ == "AlignDevicesHook" and not hook.offload
        return None if moves else f"accelerate's {type(hook).__name__}"
    forward = module.__dict__.get("forward")
    if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
        return None if _collects(forward) else "a forward of its own"
    return None


def _collects(function: Any) -> bool:
    return getattr(function, "__globals__", {}).get("__name__") in _COLLECTS


def _weight_trouble(weight: Any, first: Tensor | None) -> str | None:
    """first: what dtype and device must be those of."""
    if type(weight) is not nn.Parameter:
        return f"weight is a {_kind(weight)}"
    if weight.device.type == "meta":
        return "weight is on the meta device: offloaded, or not loaded yet"
    if weight.dtype not in DTYPES:
        return f"weight is {weight.dtype}"
    if first is not None and (weight.dtype != first.dtype or weight.device != first.device):
        return f"weight is {weight.dtype} on {weight.device}, q_proj's {first.dtype} on {first.device}"
    return None if weight.is_contiguous() else "weight is not contiguous"


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


class Reading:
    """The fused weights of a layer, and what they were read from: a copy, and what is unpickled, has nothing read."""

    qkv: Fused
    gate_up: Fused

    def __init__(self) -> None:
        self._children: Any = None

    def __reduce__(self) -> tuple[type[Reading], tuple[()]]:
        return Reading, ()

    def holds(self, layer: Any) -> bool:
        """Whether the layer is as it was read: its modules, their classes, attributes and hooks, the fused weights.

        2 us. Other weights need no such look: the layer's forward takes them as they are.
        """
        try:
            children = _CHILDREN(layer._modules)
            return (
                children == self._children
                and _OF_ATTENTION(children[0]._modules) == self._of_attention
                and _OF_MLP(children[1]._modules) == self._of_mlp
                and [*map(type, self._modules)] == self._types
                and [*map(len, self._attributes)] == self._counts
                and all(map(is_, chain.from_iterable(self._owned), self._parameters))
                and [*map(Tensor.data_ptr, self._fused)] == self._addresses
                and self._guards(*self._fused)
                and self._settings.get(_CHOSEN) == NAME
                and (RemovableHandle.next_id == self._next_hook or self._no_hooks())
            )
        except KeyError:
            return False

    def read(self, layer: Any) -> None:
        """Fuse the weights of a layer that has no `trouble`: they are moved next to each other where they are apart."""
        attention, mlp = layer.self_attn, layer.mlp
        linears = [[getattr(attention, name) for name in QKV], [getattr(mlp, name) for name in GATE_UP]]
        self.qkv, self.gate_up = map(fuse, linears)
        self._children = _CHILDREN(layer._modules)
        self._of_attention, self._of_mlp = _OF_ATTENTION(attention._modules), _OF_MLP(mlp._modules)
        self._modules = [*self._children, *self._of_attention, *self._of_mlp]
        self._types = [*map(type, self._modules)]
        self._attributes = [module.__dict__ for module in self._modules]  # a forward of its own is one more
        self._counts = [*map(len, self._attributes)]
        self._settings = attention.config.__dict__
        self._owned = [linear._parameters.values() for linear in chain(*linears)]
        self._parameters = [*chain.from_iterable(self._owned)]  # weights and biases
        self._fused = [parameter for parameter in self._parameters if parameter is not None]
        self._addresses = [*map(Tensor.data_ptr, self._fused)]
        sizes: list[Any] = [list(tensor.shape) for tensor in self._fused]
        strides: list[Any] = [list(tensor.stride()) for tensor in self._fused]
        guards = TensorGuards(*self._fused, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        self._guards = guards.check
        self._next_hook = RemovableHandle.next_id
        self._room = -1, 0  # rows, and elements of scratch memory for them

    def _no_hooks(self) -> bool:
        """Asked where a hook was registered since, on any module of the process."""
        next_hook = RemovableHandle.next_id
        if any(map(hooked, self._modules)):
            return False
        self._next_hook = next_hook
        return True

    def workspace(self, num_rows: int) -> Tensor | None:
        """Scratch memory for the layer's matmuls of so many rows, one at a time; None where none is needed."""
        others = self._of_attention[-1].weight, self._of_mlp[2].weight
        if self._room[0] != num_rows:  # asked anew only where the batch changes: it takes 8 us
            matrices = self.qkv[0], self.gate_up[0], *others
            spaces = [kernels.matmul_workspace(num_rows, matrix) for matrix in matrices]
            self._room = num_rows, max(map(Tensor.numel, spaces))
        size = self._room[1]
        return torch.zeros(size, dtype=torch.float32, device=others[0].device) if size else None
