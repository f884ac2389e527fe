"""The name table: the rows of our parameters that hold each Hugging Face tensor, and copying by it both ways."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastllama.errors import CheckpointError
from fastllama.layers.config import LlamaConfig

if TYPE_CHECKING:
    from fastllama.layers.model import LlamaForCausalLM

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Slot:
    """Rows [start, start + rows) of one of our parameters."""

    parameter: str
    start: int
    rows: int


def slots(config: LlamaConfig) -> dict[str, Slot]:
    """Hugging Face tensor name -> where it lives. Tied embeddings have no lm_head.weight of their own."""
    hidden, inner, q, kv = config.hidden_size, config.intermediate_size, config.q_size, config.kv_size
    table = {"model.embed_tokens.weight": Slot("embed_tokens.weight", 0, config.vocab_size)}
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
        table["lm_head.weight"] = Slot("lm_head.weight", 0, config.vocab_size)
    return table


@torch.no_grad()
def load_weights(
    model: LlamaForCausalLM, tensors: Iterable[tuple[str, Tensor]], *, file_of: Callable[[str], object] | None = None
) -> None:
    """Copy Hugging Face tensors into the model, cast to each parameter's dtype; each is checked before it is written.

    `file_of` names the file of a tensor for messages. Raises CheckpointError for a tensor that is unexpected, repeated,
    missing, of the wrong shape or dtype, holds NaN or infinity, or does not fit the parameter's dtype.
    """
    parameters, missing = dict(model.named_parameters()), slots(model.config)
    expected = frozenset(missing)

    def fail(name: str, trouble: str) -> CheckpointError:
        origin = f"{file_of(name)}: " if file_of else ""
        return CheckpointError(f"{origin}tensor {name} {trouble}")

    for name, tensor in tensors:
        if name.endswith("rotary_emb.inv_freq"):  # written by transformers before 4.32, and recomputed by everyone
            continue
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            wanted = list(model.embed_tokens.weight.shape)
            if list(tensor.shape) != wanted:
                raise fail(name, f"has shape {list(tensor.shape)}, expected {wanted}, as the embeddings are tied to it")
            continue
        if name not in expected:
            raise fail(name, "is unexpected: no part of the Llama that the configuration declares")
        slot = missing.pop(name, None)
        if slot is None:
            raise fail(name, "appears twice")
        target = parameters[slot.parameter][slot.start : slot.start + slot.rows]
        if tensor.shape != target.shape:
            raise fail(name, f"has shape {list(tensor.shape)}, expected {list(target.shape)} by the configuration")
        if trouble := _value_trouble(tensor, target.dtype):
            raise fail(name, trouble)
        target.copy_(tensor)
    if missing:
        first, *rest = missing
        others = f", and so are {len(rest)} others" if rest else ""
        raise fail(first, f"is missing{others}; the checkpoint is incomplete")


def hf_tensors(model: LlamaForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """The model's weights under Hugging Face names, in the order of `slots`: views, but of packed ones copies."""
    for name, slot in slots(model.config).items():
        yield name, attrgetter(slot.parameter)(model).detach()[slot.start : slot.start + slot.rows]


def _value_trouble(tensor: Tensor, dtype: torch.dtype) -> str | None:
    if tensor.dtype not in _FLOATS:
        return f"has dtype {tensor.dtype}, expected floating point; is the checkpoint quantized?"
    low, high = (bound.item() for bound in torch.aminmax(tensor))  # NaN wins over every number
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        return "holds NaN or infinity; the file is damaged or the training diverged"
    limit = torch.finfo(dtype).max
    if max(-low, high) > limit:
        return f"reaches {max(-low, high):.4g}, beyond {dtype}'s {limit:.4g}; load it as bfloat16 or float32"
    return None
