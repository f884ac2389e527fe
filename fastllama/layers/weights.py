"""The name table: the rows of our parameters that hold each Hugging Face tensor, and copying by it both ways."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastllama.errors import CheckpointError, counted, shown
from fastllama.layers.config import LlamaConfig
from fastllama.layers.tensor_names import is_foreign, is_quantized, is_recomputed, undeclared_bias, why_unexpected

if TYPE_CHECKING:
    from fastllama.layers.model import LlamaForCausalLM

logger = logging.getLogger("fastllama")

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_CLASSIFIER = "score.weight"  # of LlamaForSequenceClassification and reward models
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LEGAL = "float32, bfloat16, float16 or float64"
# The sizes of a configuration that give a parameter its shape.
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
    """Hugging Face tensor name -> where it lives. Tied embeddings have no lm_head.weight of their own."""
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


@torch.no_grad()
def load_weights(
    model: LlamaForCausalLM, tensors: Iterable[tuple[str, Tensor]], *, file_of: Callable[[str], object] | None = None
) -> None:
    """Copy Hugging Face tensors into the model, cast to each parameter's dtype; each is checked before it is written.

    Tables that everyone recomputes are passed over. Logged are tensors outside of every Llama, such as a value head,
    biases that the configuration does not declare and that are zero, and declared ones that are missing, which become
    zero. `file_of` names the file of a tensor for messages. Raises CheckpointError for a tensor that is unexpected,
    missing, of the wrong shape or dtype, holds NaN or infinity, does not fit the parameter's dtype, or comes again with
    other values. (transformers loads a file with an unexpected or a missing weight, and warns.)
    """
    config, parameters, missing = model.config, dict(model.named_parameters()), slots(model.config)
    table, skipped, zeros = dict(missing), [], []
    if config.tie_word_embeddings:  # either name fills the one matrix
        table[HEAD] = table[EMBEDDING]
    written: set[Slot] = set()

    def fail(name: str, trouble: str) -> CheckpointError:
        origin = f"{file_of(name)}: " if file_of else ""
        return CheckpointError(f"{origin}tensor {shown(name)} {trouble}")

    for name, tensor in tensors:
        slot = table.get(name)
        if slot is None:
            if is_recomputed(name):
                continue
            if is_foreign(name) and not is_quantized(name):
                skipped.append(name)
                continue
            if trouble := misplaced(name, tensor, config):
                raise fail(name, trouble)
            zeros.append(name)
            continue
        target = parameters[slot.parameter][slot.start : slot.start + slot.rows]
        if trouble := unfit(tensor, slot, target.shape, target.dtype):
            raise fail(name, trouble)
        if slot not in written:
            target.copy_(tensor)
            written.add(slot)
        elif not torch.equal(tensor.to(target), target):
            tied = f" ({EMBEDDING} and {HEAD} are tied)" if table[name] is table.get(HEAD) is table[EMBEDDING] else ""
            raise fail(name, f"appears twice, with different values{tied}")
    absent = [name for name, slot in missing.items() if slot not in written]
    biases = [name for name in absent if name.endswith(".bias")]
    if len(biases) < len(absent):
        raise fail(*_missing([name for name in absent if name not in biases], skipped))
    for name in biases:
        slot = missing[name]
        parameters[slot.parameter][slot.start : slot.start + slot.rows] = 0
    _log(skipped, "outside of the Llama, and not loaded")
    _log(zeros, "not loaded: the configuration declares no such bias, and its values are all zero")
    _log(biases, "missing, and taken as zero, as in transformers")


def _missing(absent: list[str], skipped: list[str]) -> tuple[str, str]:
    first, *rest = absent
    others = f", and so {'is' if len(rest) == 1 else 'are'} {counted(len(rest), 'other')}" if rest else ""
    if prefixed := [name for name in skipped if name.endswith(f".{first.removeprefix('model.')}")]:
        return first, f"is missing{others}; names here begin otherwise: {shown(prefixed[0])}"
    if absent == [HEAD] and _CLASSIFIER in skipped:
        return first, f"is missing, and {_CLASSIFIER} is there: a classifier, which writes no text"
    if absent == [HEAD]:
        return first, "is missing, and the configuration has tie_word_embeddings=False; the checkpoint is incomplete"
    return first, f"is missing{others}; the checkpoint is incomplete"


def _log(names: list[str], what: str) -> None:
    if names:
        others = f" and {len(names) - 1} more are" if names[1:] else " is"
        logger.warning("tensor %s%s %s", shown(names[0]), others, what)


def hf_tensors(model: LlamaForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """The model's weights under Hugging Face names, in the order of `slots`: views, but of packed ones copies."""
    for name, slot in slots(model.config).items():
        yield name, attrgetter(slot.parameter)(model).detach()[slot.start : slot.start + slot.rows]


def misplaced(name: str, tensor: Tensor, config: LlamaConfig) -> str | None:
    """Why a tensor without a slot is refused; None for a bias that the configuration does not declare, of zeros."""
    if is_quantized(name):
        return f"belongs to quantized weights; expected {_LEGAL}"
    flag = undeclared_bias(name, config)
    if flag is None:
        return f"is unexpected: {why_unexpected(name, config)}"
    if tensor.dtype not in _FLOATS or tensor.any():
        return f"is unexpected: the configuration has {flag}=False, and the bias is not zero"
    return None


def unfit(tensor: Tensor, slot: Slot, shape: Sequence[int], dtype: torch.dtype) -> str | None:
    """Why a tensor cannot be written to a slot of a shape, in a dtype: its shape, dtype or values. None if it can."""
    if tuple(tensor.shape) != tuple(shape):
        names = _SIZES[slot.parameter.split(".")[-2]]
        return f"has shape {list(tensor.shape)}, expected {list(shape)} by the configuration ({names})"
    if tensor.dtype not in _FLOATS:
        return f"has dtype {tensor.dtype}, expected {_LEGAL}; is the checkpoint quantized?"
    low, high = (bound.item() for bound in torch.aminmax(tensor))  # NaN wins over every number
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        return "holds NaN or infinity; the file is damaged or the training diverged"
    limit = torch.finfo(dtype).max
    if max(-low, high) > limit:
        return f"reaches {max(-low, high):.4g}, beyond {dtype}'s {limit:.4g}; load it as bfloat16 or float32"
    return None
