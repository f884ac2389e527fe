"""`patch` and `unpatch`: switch one model's layers, norms and attention to our ops, and back."""

from __future__ import annotations

import copy
import types
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers
from packaging.version import Version
from torch import nn
from transformers.models.llama import modeling_llama

from fastllama.integrations.transformers.layer import LlamaDecoderLayer
from fastllama.integrations.transformers.norm import LlamaRMSNorm
from fastllama.integrations.transformers.reading import Reading
from fastllama.integrations.transformers.trouble import (
    NAME,
    collects,
    foreign,
    foreign_attention,
    is_stock,
    kind_of,
    moved,
    overridden,
    trouble,
)

OLDEST, NEWEST = "4.57.6", "5.24.0"  # tested versions of transformers, from and to


@dataclass(frozen=True)
class PatchReport:
    """The result of `patch`: the number of decoder layers on our ops, of all, and why the others are not."""

    patched: int
    layers: int
    norms: int  # patched norms outside patched layers
    left: dict[str, str] = field(default_factory=dict)  # module's name -> reason

    def __str__(self) -> str:
        """`patched 29 of 32 layers; not patched: model.layers.3 and 2 more (q_proj is a ...)`."""
        text = f"patched {self.patched} of {self.layers} layers"
        for reason in dict.fromkeys(self.left.values()):
            first, *others = (name for name, why in self.left.items() if why == reason)
            text += f"; not patched: {first}{f' and {len(others)} more' if others else ''} ({reason})"
        return text


def patch(model: nn.Module, *, strict: bool = False) -> PatchReport:
    """Run a transformers Llama on fastllama's ops, in place, until `unpatch`; other models are unaffected.

    model: contains a transformers LlamaModel (LlamaForCausalLM, LlamaForSequenceClassification, a PEFT model), in
    float32, bfloat16 or float16. A decoder layer becomes six launches: four matmuls fused with norm, SwiGLU and
    residual, rotary embedding with the KV write, attention. Weights keep their names and are shared: q, k, v (and gate,
    up) are moved next to each other in memory, one layer at a time.
    Linear layers quantized by FastLlamaConfig run on the ops of their kind.
    Unsupported layers (LoRA, other quantizations, offloaded, hooked, another activation) keep transformers' code, and a
    warning names them. Training, autocast and gradients run transformers' code too. Later changes are noticed at the
    next call.
    strict: raise ValueError, and change nothing, where a layer cannot be patched.
    Returns a PatchReport: print it. Patching again includes layers that have become supported.
    Raises TypeError for a model without a LlamaModel, ValueError where config.output_attentions is set.
    Supported: transformers 4.57.6 to 5.24.0; another version is tried, with a warning.
    """
    bodies = _bodies(model)
    if not Version(OLDEST) <= Version(transformers.__version__) <= Version(NEWEST):
        warnings.warn(
            f"transformers {transformers.__version__} is not among the versions that fastllama.patch is tested with, "
            f"{OLDEST} to {NEWEST}",
            stacklevel=2,
        )
    layers: dict[str, Any] = {}
    left: dict[str, str] = {}
    ready = []
    for name, body in bodies:
        if getattr(body.config, "output_attentions", False):
            raise ValueError("config.output_attentions is True; legal: False, as fused attention keeps no weights")
        of_body = {f"{name}.layers.{index}".lstrip("."): layer for index, layer in enumerate(body.layers)}
        reason_for_all = _unsuited(of_body)
        layers |= of_body
        left |= {name: reason for name, layer in of_body.items() if (reason := reason_for_all or unfit(layer))}
        if reason_for_all is None:
            ready.append(body)
    if left and strict:
        raise ValueError(f"strict: {PatchReport(len(layers) - len(left), len(layers), 0, left)}")
    for body in ready:
        _take_attention(model, body)
    inside = set()
    for name, layer in layers.items():
        if name not in left:
            inside |= {id(layer.input_layernorm), id(layer.post_attention_layernorm)}
            if type(layer) is not LlamaDecoderLayer:
                reading = layer.__dict__["_fastllama"] = Reading()
                reading.read(layer)
                _give_class(layer, LlamaDecoderLayer)
    norms = [module for module in model.modules() if id(module) not in inside and _is_norm(module)]
    for norm in norms:
        _give_class(norm, LlamaRMSNorm)
    report = PatchReport(len(layers) - len(left), len(layers), len(norms), left)
    if left:
        warnings.warn(str(report), stacklevel=2)
    return report


def unpatch(model: nn.Module) -> None:
    """Restore transformers' classes and the previous attention of a model. Weights stay in place.

    Raises TypeError for a model without a LlamaModel; one that is not patched stays as it is.
    """
    for _, body in _bodies(model):
        before = body.__dict__.pop("_fastllama_attention", None)
        if before is not None and body.config._attn_implementation == NAME:
            body.config._attn_implementation = before
    for module in model.modules():
        if type(module) in (LlamaDecoderLayer, LlamaRMSNorm):
            _give_class(module, type(module).__mro__[1])
            module.__dict__.pop("_fastllama", None)


def _bodies(model: nn.Module) -> list[tuple[str, Any]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; legal: a transformers model")
    bodies = [(name, module) for name, module in model.named_modules() if isinstance(module, modeling_llama.LlamaModel)]
    if not bodies:
        raise TypeError(
            f"model is {kind_of(model)}; legal: a transformers model of "
            "model_type llama, or one that contains a transformers LlamaModel"
        )
    return bodies


def _unsuited(layers: Mapping[str, Any]) -> str | None:
    """Why none of a body's layers can be patched: all get one mask, and other attention does not accept ours."""
    for name, layer in layers.items():
        attention: Any = getattr(layer, "self_attn", None)
        if not is_stock(attention, "LlamaAttention"):
            return f"{name}.self_attn is {foreign(attention)}"
        if reason := foreign_attention(attention.config):
            return reason
    return None


def unfit(layer: nn.Module) -> str | None:
    """Why a layer cannot be patched; None where it can be, or already is."""
    if type(layer) is not LlamaDecoderLayer and not is_stock(layer, "LlamaDecoderLayer"):
        return f"it is {foreign(layer)}"
    reason = overridden(layer)
    return trouble(layer) if reason is None else f"it has {reason}"


def _is_norm(module: nn.Module) -> bool:
    kind = type(module) is LlamaRMSNorm or is_stock(module, "LlamaRMSNorm")
    return kind and moved(module) is None and overridden(module) is None


def _take_attention(model: nn.Module, body: Any) -> None:
    """Select our attention and mask for a body; its config is copied, as models may share one."""
    if "_fastllama_attention" not in body.__dict__:
        shared, own = body.config, copy.deepcopy(body.config)
        for module in model.modules():
            if module.__dict__.get("config") is shared:
                module.config = own
        body._fastllama_attention = own._attn_implementation
    body.config._attn_implementation = NAME


def _give_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Change a module's class, and references to the old class's forward in the module itself.

    accelerate stores one with its hook, and transformers 4.57 leaves one after collecting hidden states.
    """
    old = type(module)
    if old is kind:
        return
    kept = "_old_forward" if "_old_forward" in module.__dict__ else "forward"
    forward = module.__dict__.get(kept)
    module.__class__ = kind
    if forward is not None and (getattr(forward, "__func__", None) is old.forward or collects(forward)):
        module.__dict__[kept] = types.MethodType(kind.forward, module)
