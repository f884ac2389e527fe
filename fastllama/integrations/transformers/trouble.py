"""What a decoder layer must be to run on our ops: transformers' own modules, plain weights or our quantized ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules import module as torch_module
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from fastllama.integrations.transformers.linears import HF_LINEARS
from fastllama.integrations.transformers.norm import LlamaRMSNorm

NAME = "fastllama"  # of our attention and our masks in transformers' registries
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int8)  # that codes are packed in
QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
_QUANTIZED = (*HF_LINEARS.values(),)
_MODELING = modeling_llama.__name__
# Hooks of transformers' own, by which it collects hidden states: they do nothing to what a module computes.
_COLLECTS = ("transformers.utils.output_capturing", "transformers.utils.generic")
_GRADIENTS = "transformers.modeling_utils"  # whose hook on embeddings asks for gradients, and stays there afterwards
# What torch's decorators make of a function: none changes what it computes.
_OF_TORCH = ("torch.utils._contextlib", "torch._dynamo.eval_frame")


def trouble(layer: Any) -> str | None:
    """Why a LlamaDecoderLayer cannot run on our ops, in a few words; None where it can.

    What torch.compile traces of this becomes guards: a compiled layer is compiled anew when an answer changes.
    """
    attention, mlp = layer.self_attn, layer.mlp
    for name, kind in (("self_attn", "LlamaAttention"), ("mlp", "LlamaMLP")):
        if not is_stock(getattr(layer, name), kind):
            return f"{name} is {foreign(getattr(layer, name))}"
    for name in NORMS:
        norm = getattr(layer, name)
        if type(norm) is not LlamaRMSNorm and not is_stock(norm, "LlamaRMSNorm"):
            return f"{name} is {foreign(norm)}"
    q_proj = getattr(attention, "q_proj", None)
    first = getattr(q_proj, "weight", None) if type(q_proj) is nn.Linear else None  # a quantized layer computes its own
    if first is None:
        first = getattr(layer.input_layernorm, "weight", None)
    if first is None:
        return f"input_layernorm's {weight_trouble(first, first)}"
    owners: tuple[tuple[Any, tuple[str, ...]], ...] = (attention, (*QKV, "o_proj")), (mlp, (*GATE_UP, "down_proj"))
    for owner, names in owners:
        for name in names:
            if reason := _linear_trouble(name, getattr(owner, name, None), first):
                return reason
    for owner, fused in ((attention, QKV), (mlp, GATE_UP)):
        if len({getattr(owner, name).bias is None for name in fused}) > 1:
            return f"only some of {', '.join(fused)} have a bias"
    for name in NORMS:
        if reason := weight_trouble(getattr(getattr(layer, name), "weight", None), first):
            return f"{name}'s {reason}"
    if type(mlp.act_fn).__name__ not in ("SiLUActivation", "SiLU"):
        return f"its activation is {kind_of(mlp.act_fn)}"
    if not is_own(modeling_llama.apply_rotary_pos_emb):
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
    return kind.__name__ == name and kind.__module__ == _MODELING and is_own(kind.forward, _MODELING)


def is_own(function: Any, module: str = "transformers.") -> bool:
    """Whether a function is of a module whose name begins so, under no decorators but transformers' and torch's.

    What functools.wraps makes has the names of what it wraps: where the code comes from its globals tell.
    """
    inner = getattr(function, "__wrapped__", None)
    while inner is not None:
        if not _home(function).startswith(("transformers.", *_OF_TORCH)):
            return False
        function, inner = inner, getattr(inner, "__wrapped__", None)
    return _home(function).startswith(module)


def _home(function: Any) -> str:
    """The module that a function was written in; empty for what is no function of Python."""
    return str(getattr(function, "__globals__", {}).get("__name__", ""))


def foreign_attention(config: Any) -> str | None:
    """Why the attention function of a layer's configuration is not one whose place ours can take."""
    name = config._attn_implementation
    if name == NAME or "/" in (name or ""):  # the latter are kernels of the hub, that transformers registers
        return None
    eager = name in (None, "eager")
    function = modeling_llama.eager_attention_forward if eager else ALL_ATTENTION_FUNCTIONS.get(name, None)
    return None if is_own(function) else f"its attention function {name!r} is none of transformers' own"


def global_hooks() -> bool:
    """Whether there are hooks that every call of a module runs."""
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


def hooked(module: nn.Module) -> str | None:
    """What would be passed over where a module's weights are used and the module is not called; None if nothing."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for hook in hooks.values():
            if not collects(hook) and _home(hook) != _GRADIENTS:
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
    return _home(function) in _COLLECTS


def _linear_trouble(name: str, linear: Any, first: Tensor) -> str | None:
    if linear is None:
        return f"there is no {name}"
    if type(linear) is nn.Linear:
        weight = getattr(linear, "weight", None)
        if weight is None:
            return f"{name}'s {weight_trouble(weight, first)}"
        reason, shape = weight_trouble(weight, first), (*weight.shape,)
    elif type(linear) in _QUANTIZED:
        reason, shape = _quantized_trouble(linear, first), (linear.scales.shape[0], linear.in_features)
    else:
        return f"{name} is {kind_of(linear)}"
    if reason is None and linear.bias is not None:
        reason = weight_trouble(linear.bias, first, "bias")
    if reason is not None:
        return f"{name}'s {reason}"
    whole = linear.out_features, linear.in_features
    return None if shape == whole else f"{name}'s weight has shape {[*shape]}"


def _quantized_trouble(linear: Any, first: Tensor) -> str | None:
    """Of the tensors that stand for its weight."""
    floats = torch.float32, first.dtype
    for name, dtypes in (("packed", INTEGERS), ("scales", floats), ("zeros", (torch.uint8, *floats))):
        tensor = getattr(linear, name)
        if tensor is not None and (reason := _tensor_trouble(name, tensor, (Tensor,), dtypes, first)):
            return reason
    return None


def weight_trouble(weight: Any, first: Any, name: str = "weight") -> str | None:
    """first: what dtype and device must be those of."""
    if weight is None:
        return f"{name} is not there: another library keeps it in a form of its own"
    if type(weight) is nn.Parameter and weight.device.type != "meta" and weight.dtype not in DTYPES:
        return f"{name} is {weight.dtype}"
    return _tensor_trouble(name, weight, (nn.Parameter,), (first.dtype,), first)


def _tensor_trouble(
    name: str, tensor: Any, kinds: tuple[type, ...], dtypes: tuple[torch.dtype, ...], first: Tensor
) -> str | None:
    if type(tensor) not in kinds:
        return f"{name} is {kind_of(tensor)}"
    if tensor.device.type == "meta":
        return f"{name} is on the meta device: offloaded, or not loaded yet"
    if not is_compiling() and tensor.device.type == "cpu" and tensor.is_shared():  # every tensor of a GPU is
        return f"{name} is in memory that processes share, of which a fused weight would be a copy"
    if tensor.dtype not in dtypes or tensor.device != first.device:
        return f"{name} is {tensor.dtype} on {tensor.device}, beside {first.dtype} on {first.device}"
    return None if tensor.is_contiguous() else f"{name} is not contiguous"


def foreign(module: Any) -> str:
    """What a module is that is not transformers' own, or whose class has been given another forward."""
    kind = type(module)
    replaced = kind.__module__ == _MODELING and not is_own(kind.forward, _MODELING)
    return f"{kind_of(module)}{' whose forward was replaced' if replaced else ''}"


def kind_of(value: Any) -> str:
    """A value's class in a sentence: "a torch.nn.modules.linear.Linear"."""
    return f"a {type(value).__module__}.{type(value).__qualname__}"
