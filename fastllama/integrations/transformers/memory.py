"""`from_transformers`: wraps a transformers Llama as our model, over the same memory."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from fastllama.errors import brief, counted
from fastllama.integrations.transformers.fused import fuse
from fastllama.integrations.transformers.norm import LlamaRMSNorm
from fastllama.integrations.transformers.patch import unfit
from fastllama.integrations.transformers.trouble import (
    DTYPES,
    GATE_UP,
    NORMS,
    QKV,
    foreign,
    foreign_attention,
    hooked,
    is_own,
    is_stock,
    kind_of,
    weight_trouble,
)
from fastllama.io.companions import sampling_settings
from fastllama.io.tokenizer import as_tokenizer
from fastllama.layers.config import LlamaConfig, token_ids
from fastllama.layers.linear import LinearBase
from fastllama.layers.model import LlamaForCausalLM
from fastllama.layers.quantized import LINEARS, QuantizedLinear
from fastllama.layers.rope import attention_factor, inverse_frequencies
from fastllama.layers.weights import misshapen, slots
from fastllama.quant.weight import QuantizedWeight

# Our layers, and the linear layers of a transformers decoder layer that each fuses.
_LINEARS: dict[str, tuple[str, Sequence[str]]] = {
    "self_attn.qkv_proj": ("self_attn", QKV),
    "self_attn.o_proj": ("self_attn", ("o_proj",)),
    "mlp.gate_up_proj": ("mlp", GATE_UP),
    "mlp.down_proj": ("mlp", ("down_proj",)),
}


def from_transformers(model: nn.Module, tokenizer: Any = None) -> LlamaForCausalLM:
    """A transformers Llama as a model for `LLM`, sharing the memory of the weights.

    model: a transformers LlamaForCausalLM in float32, bfloat16 or float16, patched or not, quantized with
    FastLlamaConfig or not. It stays usable, and may be patched later: q, k and v (and gate, up) are moved next to each
    other in memory, one layer at a time. Quantized ones without a multiple of 64 rows are copied instead, as only whole
    tiles of rows can be fused.
    In-place writes to its weights change ours too, and vice versa (LLM.update_weights; call LLM.reset_prefix_cache
    after writing). Weights that are moved or replaced (`.to()`, `.half()`) are no longer shared.
    Quantizing ours does not change the other. Either may be deleted.
    tokenizer: the model's, of transformers or an argument of load_tokenizer. Where ours would produce other ids, a
    warning is logged, and only token ids are accepted and returned.
    End-of-text tokens and LLM's sampling settings are those of model.generation_config.
    Raises TypeError for anything but a LlamaForCausalLM, ValueError where its logits depend on more than its weights
    (LoRA, hooks, offloaded weights, another activation, several devices), and changes nothing then.
    """
    if not isinstance(model, modeling_llama.LlamaForCausalLM):
        of_peft = "; for a PEFT model, the result of merge_and_unload()" if hasattr(model, "merge_and_unload") else ""
        raise TypeError(f"model is {kind_of(model)}; legal: a transformers LlamaForCausalLM{of_peft}")
    given: Any = model
    _check(given)
    generation = _as_json("generation_config", given.generation_config)
    config = _config(given, generation)
    ours = LlamaForCausalLM(config, given.lm_head.weight.dtype, "meta")
    _check_shapes(given, ours)
    ours.tokenizer = None if tokenizer is None else as_tokenizer(tokenizer)
    name = getattr(given, "name_or_path", None) or None
    ours.name_or_path = name
    source = generation or _as_json("config", given.config)  # as for files: generation_config.json, else config.json
    ours.sampling_settings = sampling_settings(source, f"{name or type(model).__name__}: generation_config")
    _share(given, ours)
    return ours.eval()


def _check(model: Any) -> None:
    """Raise ValueError where the model's logits depend on more than its weights, or these cannot be shared."""
    left: dict[str, list[str]] = {}  # reason -> modules
    for name, reason in _troubles(model):
        left.setdefault(reason, []).append(name)
    if left:
        parts = (f"{_first(names)} ({reason})" for reason, names in left.items())
        raise ValueError(f"model has parts that fastllama would ignore: {'; '.join(parts)}")


def _first(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _troubles(model: Any) -> Iterator[tuple[str, str]]:
    """Names of modules that cannot be converted, each with the reason."""
    body: Any = getattr(model, "model", None)
    head, kind = getattr(model, "lm_head", None), type(model)
    if not is_own(kind.forward, modeling_llama.__name__):
        yield "the model", f"it is {kind_of(model)} with a forward of its own"
    if kind.__call__ is not nn.Module.__call__:
        yield "the model", f"it is {kind_of(model)} with a __call__ of its own"
    if not is_stock(body, "LlamaModel"):
        yield "model.model", f"it is {foreign(body)}"
        return
    embedding, norm, rotary = (getattr(body, name, None) for name in ("embed_tokens", "norm", "rotary_emb"))
    plain: dict[str, bool] = {
        "model.embed_tokens": type(embedding) is nn.Embedding and embedding.max_norm is None,
        "model.norm": type(norm) is LlamaRMSNorm or is_stock(norm, "LlamaRMSNorm"),
        "model.rotary_emb": is_stock(rotary, "LlamaRotaryEmbedding"),
        "lm_head": type(head) is nn.Linear and head.bias is None,
    }
    if wrong := [name for name, is_plain in plain.items() if not is_plain]:
        found = {"model.embed_tokens": embedding, "model.norm": norm, "model.rotary_emb": rotary, "lm_head": head}
        yield from ((name, f"it is {_described(found[name])}") for name in wrong)
        return
    for name in ("", "model", *plain, *(f"model.layers.{index}" for index in range(len(body.layers)))):
        if reason := hooked(model.get_submodule(name)):
            yield name or "the model", f"it has {reason}"
    first = getattr(embedding, "weight", None)
    if first is None:
        yield "model.embed_tokens", str(weight_trouble(first, first))
        return
    for name in ("model.embed_tokens", "model.norm", "lm_head"):
        if reason := weight_trouble(getattr(model.get_submodule(name), "weight", None), first):
            yield name, reason
    for index, layer in enumerate(body.layers):
        reason = unfit(layer) or _layer_trouble(layer, first)
        if reason:
            yield f"model.layers.{index}", reason
    yield from _used_twice(model)


def _used_twice(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Weights shared by two modules: fused ones are moved or copied, and only one of the two would follow."""
    seen: dict[tuple[torch.device, int], str] = {}
    for name, tensor in chain(model.named_parameters(remove_duplicate=False), _packed(model)):
        if type(tensor) not in (nn.Parameter, Tensor) or tensor.is_meta or not tensor.numel():
            continue
        other = seen.setdefault((tensor.device, tensor.data_ptr()), name)
        if other != name and {other, name} != {"model.embed_tokens.weight", "lm_head.weight"}:
            yield name, f"it is {other} too"


def _packed(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedLinear):
            yield from ((f"{name}.{each}", tensor) for each, tensor in module.named_buffers())


def _described(module: Any) -> str:
    if module is None:
        return "missing"
    kind = foreign(module)
    if type(module) is nn.Embedding:
        return f"{kind} with max_norm={module.max_norm}"
    return f"{kind} with a bias" if type(module) is nn.Linear else kind


def _layer_trouble(layer: Any, first: Tensor) -> str | None:
    """Why a patchable decoder layer cannot be converted. first: a weight with the required dtype and device."""
    attention = layer.self_attn
    if reason := foreign_attention(attention.config):
        return reason
    if reason := weight_trouble(layer.input_layernorm.weight, first):
        return f"input_layernorm's {reason}"
    if not getattr(attention, "is_causal", True):
        return "its attention is not causal"
    if not math.isclose(attention.scaling, attention.head_dim**-0.5):
        return f"its attention's scaling is {attention.scaling}, and 1 / sqrt(head_dim) {attention.head_dim**-0.5}"
    for owner, names in ((attention, QKV), (layer.mlp, GATE_UP)):
        forms = {getattr(getattr(owner, name), "form", None) for name in names}
        if len(forms) > 1:
            return f"{', '.join(names)} are not quantized alike"
    return None


def _as_json(name: str, config: Any) -> dict[str, Any]:
    """A transformers configuration as its JSON file. Raises TypeError for a setting that JSON cannot represent."""
    if config is None:
        return {}
    if isinstance(ends := getattr(config, "eos_token_id", None), Tensor):
        config = copy.copy(config)
        config.eos_token_id = ends.tolist()
    try:
        content: dict[str, Any] = json.loads(config.to_json_string())
    except (TypeError, ValueError) as error:
        for key, value in vars(config).items():
            try:
                json.dumps(value)
            except (TypeError, ValueError):
                raise TypeError(f"{name}.{key} is {brief(value)}; legal: what {name}.json can hold") from None
        raise TypeError(f"{name} cannot be written as JSON ({error}); legal: what {name}.json can hold") from None
    return content


def _config(model: Any, generation: Mapping[str, Any]) -> LlamaConfig:
    """The configuration of the model's actual modules; model.config may have been changed since it was made."""
    config = LlamaConfig.from_hf(_as_json("config", model.config))
    body = model.model
    if len(body.layers) != config.num_hidden_layers:
        raise ValueError(
            f"model.model.layers has {counted(len(body.layers), 'layer')}, and config.num_hidden_layers is "
            f"{config.num_hidden_layers}; legal: the same"
        )
    config = replace(
        config,
        tie_word_embeddings=_is_same(model.lm_head.weight, body.embed_tokens.weight),
        attention_bias=_has_biases(body.layers, "self_attn", (*QKV, "o_proj")),
        mlp_bias=_has_biases(body.layers, "mlp", (*GATE_UP, "down_proj")),
    )
    if not _turns_as(config, body.rotary_emb):
        raise ValueError("model.model.rotary_emb has other frequencies than config specifies; legal: those of config")
    ends = generation.get("eos_token_id")
    if ends is None:
        return config
    listed = ends if isinstance(ends, list) else [ends]
    if beyond := [end for end in listed if isinstance(end, int) and end >= config.vocab_size]:
        raise ValueError(
            f"generation_config.eos_token_id is {beyond[0]}, and config.vocab_size {config.vocab_size}; "
            "legal: an id that the model has"
        )
    return replace(config, eos_token_ids=token_ids("generation_config.eos_token_id", ends, config.vocab_size))


def _turns_as(config: LlamaConfig, rotary: Any) -> bool:
    """Whether a rotary embedding of transformers has a configuration's frequencies, within a relative 1e-5.

    A model cast to 16 bits has wrongly rounded ones, which are accepted: ours are exact.
    """
    dynamic = config.rope_scaling is not None and config.rope_scaling.kind == "dynamic"  # depends on its last input
    found = (rotary.original_inv_freq if dynamic else rotary.inv_freq).detach().float().cpu()
    expected = inverse_frequencies(config, config.max_position_embeddings)
    if found.shape != expected.shape:
        return False
    bounds = [[(expected * share).to(dtype).float() for share in (1 - 1e-5, 1 + 1e-5)] for dtype in DTYPES]
    alike = any(bool(((low <= found) & (found <= high)).all()) for low, high in bounds)
    return alike and math.isclose(rotary.attention_scaling, attention_factor(config), rel_tol=1e-5)


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape


def _has_biases(layers: nn.ModuleList, owner: str, names: Sequence[str]) -> bool:
    """Whether the linear layers have biases. Raises ValueError where only some have."""
    with_bias = {
        f"model.layers.{index}.{owner}.{name}": getattr(getattr(layer, owner), name).bias is not None
        for index, layer in enumerate(layers)
        for name in names
    }
    if len(set(with_bias.values())) > 1:
        first = {has: next(name for name in with_bias if with_bias[name] is has) for has in (True, False)}
        raise ValueError(f"{first[True]} has a bias, and {first[False]} has none; legal: all of {owner}'s, or none")
    return any(with_bias.values())


def _check_shapes(model: Any, ours: LlamaForCausalLM) -> None:
    for name, slot in slots(ours.config).items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        packed = leaf == "weight" and isinstance(module, QuantizedLinear)
        found = (module.out_features, module.in_features) if packed else getattr(module, leaf).shape
        expected = slot.rows, *attrgetter(slot.parameter)(ours).shape[1:]
        if trouble := misshapen(found, slot, expected):
            raise ValueError(f"{name} {trouble}")


def _share(model: Any, ours: LlamaForCausalLM) -> None:
    """Give our model, which is on meta, layers over the other model's memory."""
    body = model.model
    ours.embed_tokens.weight = _shared(body.embed_tokens.weight)
    for layer, block in zip(body.layers, ours.layers, strict=True):
        for place, (owner, names) in _LINEARS.items():
            block.set_submodule(place, _linear([getattr(getattr(layer, owner), name) for name in names]))
        for name in NORMS:
            _share_norm(getattr(layer, name), getattr(block, name))
    _share_norm(body.norm, ours.norm)
    tied = ours.config.tie_word_embeddings
    ours.lm_head.weight = ours.embed_tokens.weight if tied else _shared(model.lm_head.weight)


def _linear(linears: Sequence[Any]) -> LinearBase:
    """Fuse linear layers: over their memory, or a copy where quantized ones end within a tile of rows."""
    layer = fuse(linears)
    if layer is not None:
        return layer
    weights = [linear.quantized_rows(0, linear.out_features) for linear in linears]
    first = weights[0]
    zeros = None if first.zeros is None else torch.cat([weight.zeros for weight in weights])
    values, scales = (torch.cat([getattr(weight, name) for weight in weights]) for name in ("values", "scales"))
    bias = None
    if linears[0].bias is not None:
        bias = nn.Parameter(torch.cat([linear.bias.detach() for linear in linears]), requires_grad=False)
    return LINEARS[first.kind].of(QuantizedWeight(first.kind, values, scales, zeros), bias)


def _share_norm(norm: Any, ours: Any) -> None:
    ours.weight, ours.eps = _shared(norm.weight), norm.variance_epsilon


def _shared(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach(), requires_grad=False)
