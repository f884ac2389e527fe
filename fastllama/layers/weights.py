"""The name table: which rows of our parameters hold each Hugging Face tensor, and checks of tensors for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastllama.layers.config import LlamaConfig
from fastllama.layers.quantized import QuantizedLinear
from fastllama.layers.tensor_names import is_quantized, undeclared_bias, why_unexpected
from fastllama.quant.weight import QuantizedWeight

if TYPE_CHECKING:
    from fastllama.layers.model import LlamaForCausalLM

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LEGAL = "float32, bfloat16, float16 or float64"
# The fields of a configuration that define a parameter's shape.
_SIZES = {
    "embed_tokens": "vocab_size, hidden_size",
    "lm_head": "vocab_size, hidden_size",
    "qkv_proj": "heads * head_dim, hidden_size",
    "o_proj": "hidden_size, num_attention_heads * head_dim",
    "gate_up_proj": "intermediate_size, hidden_size",
    "down_proj": "hidden_size, intermediate_size",
    "norm": "hidden_size",
    "input_layernorm": "hidden_size",
    "post_attention_layernorm": "hidden_size",
}


@dataclass(frozen=True)
class Slot:
    """Rows [start, start + rows) of one of our parameters."""

    parameter: str
    start: int
    rows: int


def slots(config: LlamaConfig) -> dict[str, Slot]:
    """Slots by Hugging Face tensor name. Tied embeddings have no separate lm_head.weight."""
    hidden, inner, q, kv = config.hidden_size, config.intermediate_size, config.q_size, config.kv_size
    table = {EMBEDDING: Slot("embed_tokens.weight", 0, config.vocab_size)}
    for i in range(config.num_hidden_layers):
        layer = f"layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            table[f"model.{layer}.{norm}.weight"] = Slot(f"{layer}.{norm}.weight", 0, hidden)
        for kind in ("weight", "bias") if config.attention_bias else ("weight",):
            at, fused = f"model.{layer}.self_attn", f"{layer}.self_attn.qkv_proj.{kind}"
            table[f"{at}.q_proj.{kind}"] = Slot(fused, 0, q)
            table[f"{at}.k_proj.{kind}"] = Slot(fused, q, kv)
            table[f"{at}.v_proj.{kind}"] = Slot(fused, q + kv, kv)
            table[f"{at}.o_proj.{kind}"] = Slot(f"{layer}.self_attn.o_proj.{kind}", 0, hidden)
        for kind in ("weight", "bias") if config.mlp_bias else ("weight",):
            at, fused = f"model.{layer}.mlp", f"{layer}.mlp.gate_up_proj.{kind}"
            table[f"{at}.gate_proj.{kind}"] = Slot(fused, 0, inner)
            table[f"{at}.up_proj.{kind}"] = Slot(fused, inner, inner)
            table[f"{at}.down_proj.{kind}"] = Slot(f"{layer}.mlp.down_proj.{kind}", 0, hidden)
    table["model.norm.weight"] = Slot("norm.weight", 0, hidden)
    if not config.tie_word_embeddings:
        table[HEAD] = Slot("lm_head.weight", 0, config.vocab_size)
    return table


def hf_tensors(model: LlamaForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """The model's weights by Hugging Face name, in the order of `slots`: views if dense, copies if packed."""
    for name, slot in slots(model.config).items():
        yield name, attrgetter(slot.parameter)(model).detach()[slot.start : slot.start + slot.rows]


def kept_tensors(model: LlamaForCausalLM) -> Iterator[tuple[str, Callable[[], Tensor | QuantizedWeight]]]:
    """A getter for each of the model's weights, by Hugging Face name; quantized ones stay quantized."""
    for name, slot in slots(model.config).items():
        yield name, partial(_kept, model, slot)


def _kept(model: LlamaForCausalLM, slot: Slot) -> Tensor | QuantizedWeight:
    path, _, leaf = slot.parameter.rpartition(".")
    layer = model.get_submodule(path)
    if leaf == "weight" and isinstance(layer, QuantizedLinear):
        return layer.quantized_rows(slot.start, slot.rows)
    return getattr(layer, leaf).detach()[slot.start : slot.start + slot.rows]


def misplaced(name: str, tensor: Tensor, config: LlamaConfig) -> str | None:
    """Why a tensor without a slot is refused; None for an undeclared bias of zeros."""
    if is_quantized(name):
        return f"belongs to quantized weights; expected {_LEGAL}"
    flag = undeclared_bias(name, config)
    if flag is None:
        return f"is unexpected: {why_unexpected(name, config)}"
    if tensor.dtype not in _FLOATS or tensor.any():
        return f"is unexpected: the configuration has {flag}=False, and the bias is not zero"
    return None


def unfit(tensor: Tensor, slot: Slot, shape: Sequence[int], dtype: torch.dtype) -> str | None:
    """Why a tensor cannot be written to a slot: its shape, dtype or values; None if it can."""
    if trouble := misshapen(tensor.shape, slot, shape):
        return trouble
    if tensor.dtype not in _FLOATS:
        return f"has dtype {tensor.dtype}, expected {_LEGAL}; is the checkpoint quantized?"
    low, high = (bound.item() for bound in torch.aminmax(tensor))  # NaN if any is
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        return "holds NaN or infinity; the file is damaged or the training diverged"
    limit = torch.finfo(dtype).max
    if max(-low, high) > limit:
        return f"reaches {max(-low, high):.4g}, beyond {dtype}'s {limit:.4g}; load it as bfloat16 or float32"
    return None


def misshapen(found: Sequence[int], slot: Slot, shape: Sequence[int]) -> str | None:
    """Why a tensor of shape `found` cannot be written to a slot of `shape`; None if they are equal."""
    if tuple(found) == tuple(shape):
        return None
    names = _SIZES[slot.parameter.split(".")[-2]]
    return f"has shape {list(found)}, expected {list(shape)} by the configuration ({names})"
