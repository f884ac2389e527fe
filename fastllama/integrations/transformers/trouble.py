"""Checks whether a decoder layer can run on our ops: stock modules, plain weights or our quantized ones."""

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

NAME = "fastllama"  # of our attention and masks in transformers' registries
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int8)  # dtypes of packed values
QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
_QUANTIZED = (*HF_LINEARS.values(),)
_MODELING = modeling_llama.__name__
# transformers' own hooks that collect hidden states; they do not change a module's result.
_COLLECTS = ("transformers.utils.output_capturing", "transformers.utils.generic")
_GRADIENTS = "transformers.modeling_utils"  # its hook on embeddings enables gradients, and stays there afterwards
# Wrappers made by torch's decorators, none of which changes a function's result.
_OF_TORCH = ("torch.utils._contextlib", "torch._dynamo.eval_frame")


def trouble(layer: Any) -> str | None:
    """Why a LlamaDecoderLayer cannot run on our ops, as a short phrase; None where it can.

    torch.compile turns these checks into guards: a compiled layer is recompiled when a result changes.
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
        return "there are global module hooks"
    return moved(layer)


def is_stock(module: Any, name: str) -> bool:
    """Whether a module is of transformers' class of that name, with the class's original forward."""
    kind = type(module)
    return kind.__name__ == name and kind.__module__ == _MODELING and is_own(kind.forward, _MODELING)


def is_own(function: Any, module: str = "transformers.") -> bool:
    """Whether a function is from a module with this prefix, under no decorators but transformers' and torch's.

    functools.wraps copies the names of the wrapped function, so the origin is taken from the function's globals.
    """
    inner = getattr(function, "__wrapped__", None)
    while inner is not None:
        if not _home(function).startswith(("transformers.", *_OF_TORCH)):
            return False
        function, inner = inner, getattr(inner, "__wrapped__", None)
    return _home(function).startswith(module)


def _home(function: Any) -> str:
    """The module that a function was defined in; empty unless it is a Python function."""
    return str(getattr(function, "__globals__", {}).get("__name__", ""))


def foreign_attention(config: Any) -> str | None:
    """Why our attention cannot replace the attention function of a layer's configuration."""
    name = config._attn_implementation
    if name == NAME or "/" in (name or ""):  # names with a slash are Hub kernels that transformers registers
        return None
    eager = name in (None, "eager")
    function = modeling_llama.eager_attention_forward if eager else ALL_ATTENTION_FUNCTIONS.get(name, None)
    return None if is_own(function) else f"its attention function {name!r} is not transformers' own"


def global_hooks() -> bool:
    """Whether there are hooks that run at the call of every module."""
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


def hooked(module: nn.Module) -> str | None:
    """A hook or forward that would be skipped if the module is not called but its weights are used; None if none."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for hook in hooks.values():
            if not collects(hook) and _home(hook) != _GRADIENTS:
                return "a hook"
    return moved(module) or overridden(module)


def moved(module: nn.Module) -> str | None:
    """A hook of accelerate that does more than move a module's arguments to its device; None if none."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None or (type(hook).__name__ == "AlignDevicesHook" and not hook.offload):
        return None
    return f"accelerate's {type(hook).__name__}"


def overridden(module: Any) -> str | None:
    """A forward on the instance that overrides the class's, other than accelerate's; None if none."""
    if getattr(module, "_hf_hook", None) is not None:
        return None
    forward, stock = module.forward, type(module).forward
    if is_compiling():  # Dynamo guards a method's code object, and does not support reading its function
        own = getattr(forward, "__code__", None) is not stock.__code__
    else:
        own = getattr(forward, "__func__", None) is not stock
    return "a forward of its own" if own and not collects(forward) else None


def collects(function: Any) -> bool:
    """Whether a hook or forward is transformers' own collector of hidden states or attention weights."""
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
    """Why the tensors of a quantized weight cannot be used; None where they can."""
    floats = torch.float32, first.dtype
    for name, dtypes in (("packed", INTEGERS), ("scales", floats), ("zeros", (torch.uint8, *floats))):
        tensor = getattr(linear, name)
        if tensor is not None and (reason := _tensor_trouble(name, tensor, (Tensor,), dtypes, first)):
            return reason
    return None


def weight_trouble(weight: Any, first: Any, name: str = "weight") -> str | None:
    """Why a weight cannot be used; None where it can. first: a weight with the required dtype and device."""
    if weight is None:
        return f"{name} is missing: another library stores it in its own form"
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
    if not is_compiling() and tensor.device.type == "cpu" and tensor.is_shared():  # true for every GPU tensor
        return f"{name} is in memory shared between processes, and a fused weight would be a copy"
    if tensor.dtype not in dtypes or tensor.device != first.device:
        return f"{name} is {tensor.dtype} on {tensor.device}, beside {first.dtype} on {first.device}"
    return None if tensor.is_contiguous() else f"{name} is not contiguous"


def foreign(module: Any) -> str:
    """Describes a module that is not a stock one, or whose class's forward was replaced."""
    kind = type(module)
    replaced = kind.__module__ == _MODELING and not is_own(kind.forward, _MODELING)
    return f"{kind_of(module)}{' whose forward was replaced' if replaced else ''}"


def kind_of(value: Any) -> str:
    """A value's class with its article: "a torch.nn.modules.linear.Linear"."""
    return f"a {type(value).__module__}.{type(value).__qualname__}"
