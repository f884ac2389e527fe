"""Other weights for a model in use, in place: what each round of reinforcement learning has for it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from fastllama.errors import nearest, shown
from fastllama.kernels.dispatch.plainness import is_plain
from fastllama.layers.linear import PackedLinear
from fastllama.layers.model import LlamaForCausalLM
from fastllama.layers.tensor_names import is_foreign, is_recomputed
from fastllama.layers.weights import EMBEDDING, HEAD, Slot, misplaced, slots, unfit


def update_weights(model: LlamaForCausalLM, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> bool:
    """Write Hugging Face tensors over a model's weights, in place; packed layers are packed anew.

    tensors: some or all of those that `load_weights` takes, each whole, in float32, bfloat16, float16 or float64 on any
    device; q, k, v and gate, up need not come together. The model then is, bit for bit, what loading and packing all of
    its weights would give; layers keep their kind. Either name fills the matrix of tied embeddings, both must agree.

    A collection (a dict, a list) is checked as a whole before anything is written. Of an iterator each tensor is
    checked, written and let go before the next is asked for, so that those before a wrong one are written. Memory: what
    packing one tensor takes, or in bf12 one fused layer.

    Every parameter and buffer keeps its memory, and captured decode steps stay right, with one exception: in bf12 the
    number of outliers and the exponent follow the weights. Returns whether these changed in any layer: captured steps
    are then wrong and must be dropped, as they must where this raises while an iterator is read. Cached keys and
    values of the old weights are the caller's to forget; no step may be in flight.

    Raises TypeError for an item that is no name with a tensor. Raises ValueError that names the tensor where it is
    unknown, comes twice, has the wrong shape or dtype, holds NaN or infinity, exceeds the model's dtype, or is no plain
    tensor with data. Tables that everyone recomputes and undeclared biases of zeros are passed over.
    """
    at_once = isinstance(tensors, Collection)
    items = tensors.items() if isinstance(tensors, Mapping) else tensors
    checked: Iterable[tuple[Slot, Tensor]] = _checked(model, items, at_once)
    if at_once:
        checked = list(checked)
    replaced = False
    for slot, tensor in checked:
        replaced |= _write(model, slot, tensor)
        del tensor  # before the next is made
    return replaced


def _checked(
    model: LlamaForCausalLM, items: Iterable[tuple[str, Tensor]], at_once: bool
) -> Iterator[tuple[Slot, Tensor]]:
    """The tensors to write, each checked when it is asked for. at_once: none is written before all are checked."""
    table, first_names = slots(model.config), dict[Slot, str]()
    if model.config.tie_word_embeddings:
        table[HEAD] = table[EMBEDDING]
    tied: Tensor = model.embed_tokens.weight
    for name, tensor in items:
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise TypeError(
                f"tensors holds {shown(name)!r} with a {type(tensor).__name__}; legal: names (str) with torch.Tensors"
            )
        slot = table.get(name)
        if slot is None:
            if not is_recomputed(name) and (trouble := _unplaced(model, table, name, tensor)):
                raise ValueError(f"tensor {shown(name)} {trouble}")
            continue
        if trouble := _trouble(model, slot, tensor):
            raise ValueError(f"tensor {shown(name)} {trouble}")
        first = first_names.get(slot)
        if first is None:
            first_names[slot] = name
            if at_once and slot == table[EMBEDDING]:
                tied = tensor
            yield slot, tensor
            del tensor  # before the next is made
        elif first == name:
            raise ValueError(f"tensor {shown(name)} appears twice; legal: each name once")
        elif not torch.equal(tensor.to(model.embed_tokens.weight), tied.to(model.embed_tokens.weight)):
            raise ValueError(f"tensor {name} differs from {first}; legal: equal values, for the two are tied")


def _unplaced(model: LlamaForCausalLM, table: Collection[str], name: str, tensor: Tensor) -> str | None:
    """Why a tensor is refused whose name the model does not have; None where it says nothing new."""
    if not is_foreign(name):
        return misplaced(name, tensor, model.config)
    hint = nearest(name, table, 0.8)
    meant = f" (did you mean {hint!r}?)" if hint else ""
    return f"is unexpected: outside of the Llama{meant}; legal: names such as {EMBEDDING}"


def _trouble(model: LlamaForCausalLM, slot: Slot, tensor: Tensor) -> str | None:
    """Why a tensor cannot be written to a slot; None where it can."""
    if not is_plain([tensor]) or tensor.layout != torch.strided:
        kind = f"{type(tensor).__name__} of layout {tensor.layout} on {tensor.device}"
        return f"of shape {list(tensor.shape)} is a {kind}; legal: plain tensors with data, such as full_tensor() gives"
    layer, kind = _place(model, slot)
    packed = kind == "weight" and isinstance(layer, PackedLinear)
    columns = (layer.in_features,) if packed else getattr(layer, kind).shape[1:]
    return unfit(tensor, slot, (slot.rows, *columns), model.dtype)


def _place(model: LlamaForCausalLM, slot: Slot) -> tuple[nn.Module, str]:
    """The layer of a slot, and its "weight" or "bias"."""
    path, _, kind = slot.parameter.rpartition(".")
    return model.get_submodule(path), kind


@torch.inference_mode()
def _write(model: LlamaForCausalLM, slot: Slot, tensor: Tensor) -> bool:
    """Returns whether buffers were replaced."""
    layer, kind = _place(model, slot)
    if kind == "weight" and isinstance(layer, PackedLinear):
        return layer.set_rows(slot.start, tensor.to(model.device, model.dtype).contiguous())
    getattr(layer, kind)[slot.start : slot.start + slot.rows].copy_(tensor)
    return False
