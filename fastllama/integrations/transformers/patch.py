"""`patch` and `unpatch`: one model's layers, norms and attention by our ops, and back."""

from __future__ import annotations

import copy
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import transformers
from packaging.version import Version
from torch import nn
from transformers.models.llama import modeling_llama

from fastllama.integrations.transformers.layer import LlamaDecoderLayer
from fastllama.integrations.transformers.norm import LlamaRMSNorm
from fastllama.integrations.transformers.weights import NAME, Reading, overridden, trouble

OLDEST, NEWEST = "4.57.6", "5.24.0"  # of transformers, tested with what lies between
_SWAPPED = {modeling_llama.LlamaDecoderLayer: LlamaDecoderLayer, modeling_llama.LlamaRMSNorm: LlamaRMSNorm}


@dataclass(frozen=True)
class PatchReport:
    """What `patch` did: how many decoder layers run on our ops, of how many, and why the others do not."""

    patched: int
    layers: int
    norms: int  # that stand alone: in no patched layer
    left: dict[str, str] = field(default_factory=dict)  # module's name -> reason

    def __str__(self) -> str:
        """`patched 30 of 32 layers; left as they are: model.layers.3 and 1 others (q_proj is a ...)`."""
        text = f"patched {self.patched} of {self.layers} layers"
        for reason in dict.fromkeys(self.left.values()):
            first, *others = (name for name, why in self.left.items() if why == reason)
            text += f"; left as they are: {first}{f' and {len(others)} others' if others else ''} ({reason})"
        return text


def patch(model: nn.Module, *, strict: bool = False) -> PatchReport:
    """Run a transformers Llama on fastllama's ops, in place, until `unpatch`; this model alone, no other.

    model: what holds a transformers LlamaModel (LlamaForCausalLM, LlamaForSequenceClassification, a PEFT model), in
    float32, bfloat16 or float16. A decoder layer becomes six launches: four matmuls with norm, SwiGLU and residual
    inside, rotary embedding with the KV write, attention. Weights keep their names and are shared: q, k, v (and gate,
    up) move next to each other in memory, one layer at a time.
    A layer that is not what it should be (LoRA, quantized, offloaded, hooked, another activation) keeps transformers'
    code, and a warning names it. Training, autocast and gradients run transformers' code too. What changes later is
    noticed at the next call.
    strict: raise ValueError, and change nothing, where a layer would be left as it is.
    Returns a PatchReport: print it. Patching again takes in layers that were left and are fit by now.
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
    for body in bodies:
        if getattr(body.config, "output_attentions", False):
            raise ValueError("config.output_attentions is True; legal: False, as fused attention keeps no weights")
    layers = dict(_layers(model))
    left = {name: reason for name, layer in layers.items() if (reason := _unfit(layer))}
    report = PatchReport(len(layers) - len(left), len(layers), 0, left)
    if left and strict:
        raise ValueError(f"strict: {report}")
    for body in bodies:
        _take_attention(model, body)
    for name, layer in layers.items():
        if name not in left and type(layer) is not LlamaDecoderLayer:
            _swap(layer)
            layer._fastllama = Reading()
            layer._fastllama.read(layer)
    inside = {
        id(norm)
        for name, layer in layers.items()
        if name not in left
        for norm in (layer.input_layernorm, layer.post_attention_layernorm)
    }
    norms = [module for module in model.modules() if id(module) not in inside and _is_norm(module)]
    for norm in norms:
        if type(norm) is not LlamaRMSNorm:
            _swap(norm)
    report = PatchReport(report.patched, report.layers, len(norms), left)
    if left:
        warnings.warn(str(report), stacklevel=2)
    return report


def unpatch(model: nn.Module) -> None:
    """Give a model back to transformers' code: the classes, and the attention that it had. Weights stay where they are.

    Raises TypeError for a model without a LlamaModel; one that is not patched stays as it is.
    """
    for body in _bodies(model):
        before = body.__dict__.pop("_fastllama_attention", None)
        if before is not None and body.config._attn_implementation == NAME:
            body.config._attn_implementation = before
    for module in model.modules():
        if type(module) in _SWAPPED.values():
            module.__dict__.pop("_fastllama", None)
            _give_class(module, type(module).__mro__[1])


def _bodies(model: nn.Module) -> list[Any]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; legal: a transformers model")
    bodies = [module for module in model.modules() if isinstance(module, modeling_llama.LlamaModel)]
    if not bodies:
        raise TypeError(
            f"model is a {type(model).__module__}.{type(model).__qualname__}; legal: a transformers model of "
            "model_type llama, or one that holds a transformers LlamaModel"
        )
    return bodies


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, modeling_llama.LlamaModel):
            for index, layer in enumerate(module.layers):
                yield f"{name}.layers.{index}".lstrip("."), layer


def _unfit(layer: nn.Module) -> str | None:
    """Why a layer cannot be patched; None where it can be, or is."""
    if type(layer) not in (modeling_llama.LlamaDecoderLayer, LlamaDecoderLayer):
        return f"it is a {type(layer).__module__}.{type(layer).__qualname__}"
    reason = overridden(layer)
    return trouble(layer) if reason is None else f"it has {reason}"


def _is_norm(module: nn.Module) -> bool:
    return type(module) in (modeling_llama.LlamaRMSNorm, LlamaRMSNorm) and overridden(module) is None


def _take_attention(model: nn.Module, body: Any) -> None:
    """Our attention and mask for a body; its config becomes its own, as models may share one."""
    if "_fastllama_attention" not in body.__dict__:
        shared, own = body.config, copy.deepcopy(body.config)
        for module in model.modules():
            if module.__dict__.get("config") is shared:
                module.config = own
        body._fastllama_attention = own._attn_implementation
    body.config._attn_implementation = NAME


def _swap(module: nn.Module) -> None:
    _give_class(module, _SWAPPED[type(module)])


def _give_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Change a module's class, and what the module itself keeps of the old one's forward.

    accelerate keeps it behind its hook, and transformers 4.57 leaves it there after collecting hidden states.
    """
    module.__class__ = kind
    if "_old_forward" in module.__dict__:
        module.__dict__["_old_forward"] = types.MethodType(kind.forward, module)
    elif "forward" in module.__dict__:
        del module.forward
