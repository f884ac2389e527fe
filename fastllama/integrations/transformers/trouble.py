"""What a decoder layer must be to run on our ops: transformers' own modules, plain weights, and nothing in between."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules import module as torch_module
from transformers.models.llama import modeling_llama

from fastllama.integrations.transformers.norm import LlamaRMSNorm

NAME = "fastllama"  # of our attention and our masks in transformers' registries
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
_MODELING = modeling_llama.__name__
# Hooks of transformers' own, by which it collects hidden states: they do nothing to what a module computes.
_COLLECTS = ("transformers.utils.output_capturing", "transformers.utils.generic")


def trouble(layer: Any) -> str | None:
    """Why a LlamaDecoderLayer cannot run on our ops, in a few words; None where it can.

    What torch.compile traces of this becomes guards: a compiled layer is compiled anew when an answer changes.
    """
    attention, mlp = layer.self_attn, layer.mlp
    for name, kind in (("self_attn", "LlamaAttention"), ("mlp", "LlamaMLP")):
        if not is_stock(getattr(layer, name), kind):
            return f"{name} is {kind_of(getattr(layer, name))}"
    first = attention.q_proj.weight if type(attention.q_proj) is nn.Linear else None
    owners: tuple[tuple[Any, tuple[str, ...]], ...] = (attention, (*QKV, "o_proj")), (mlp, (*GATE_UP, "down_proj"))
    for owner, names in owners:
        for name in names:
            linear = getattr(owner, name)
            if type(linear) is not nn.Linear:
                return f"{name} is {kind_of(linear)}"
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
        if type(norm) is not LlamaRMSNorm and not is_stock(norm, "LlamaRMSNorm"):
            return f"{name} is {kind_of(norm)}"
        if reason := _weight_trouble(norm.weight, first):
            return f"{name}'s {reason}"
    if type(mlp.act_fn).__name__ not in ("SiLUActivation", "SiLU"):
        return f"its activation is {kind_of(mlp.act_fn)}"
    if not modeling_llama.apply_rotary_pos_emb.__module__.startswith("transformers."):
        return "modeling_llama.apply_rotary_pos_emb was replaced"
    norms = layer.input_layernorm, layer.post_attention_layernorm
    for module in (attention, mlp, *norms, *attention.children(), *mlp.children()):
        if reason := hooked(module):
            return f"a {type(module).__name__} in it has {reason}"
    if global_hooks():
        return "there are hooks of all modules"
    return moved(layer)


def is_stock(module: Any, name: str) -> bool:
    """Whether a module is of transformers' own class of that name, and the class's forward is transformers' own."""
    kind = type(module)
    return kind.__name__ == name and kind.__module__ == _MODELING and kind.forward.__module__ == _MODELING


def global_hooks() -> bool:
    """Whether there are hooks that every call of a module runs."""
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


def hooked(module: nn.Module) -> str | None:
    """What would be passed over where a module's weights are used and the module is not called; None if nothing."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for hook in hooks.values():
            if not collects(hook):
                return "a hook"
    return moved(module) or overridden(module)


def moved(module: nn.Module) -> str | None:
    """A hook of accelerate that does more than to move what a module is called with to the module's device."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None or (type(hook).__name__ == "AlignDevicesHook" and not hook.offload):
        return None
    return f"accelerate's {type(hook).__name__}"


def overridden(module: Any) -> str | None:
    """A forward that stands between a module and its class's; None where there is none, but for accelerate's."""
    if getattr(module, "_hf_hook", None) is not None:
        return None
    forward, stock = module.forward, type(module).forward
    if is_compiling():  # Dynamo guards what code a method has, and knows no method's function
        own = getattr(forward, "__code__", None) is not stock.__code__
    else:
        own = getattr(forward, "__func__", None) is not stock
    return "a forward of its own" if own and not collects(forward) else None


def collects(function: Any) -> bool:
    """Whether a hook or forward is transformers' own, by which it collects hidden states or attention weights."""
    return getattr(function, "__globals__", {}).get("__name__") in _COLLECTS


def _weight_trouble(weight: Any, first: Tensor | None) -> str | None:
    """first: what dtype and device must be those of."""
    if type(weight) is not nn.Parameter:
        return f"weight is {kind_of(weight)}"
    if weight.device.type == "meta":
        return "weight is on the meta device: offloaded, or not loaded yet"
    if weight.dtype not in DTYPES:
        return f"weight is {weight.dtype}"
    if not is_compiling() and weight.device.type == "cpu" and weight.is_shared():  # every tensor of a GPU is
        return "weight is in memory that processes share, of which a fused weight would be a copy"
    if first is not None and (weight.dtype != first.dtype or weight.device != first.device):
        return f"weight is {weight.dtype} on {weight.device}, q_proj's {first.dtype} on {first.device}"
    return None if weight.is_contiguous() else "weight is not contiguous"


def kind_of(value: Any) -> str:
    """A value's class in a sentence: "a torch.nn.modules.linear.Linear"."""
    return f"a {type(value).__module__}.{type(value).__qualname__}"
