"""Updates the weights of a model in use, in place, as after each step of reinforcement learning."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import groupby

import torch
from torch import Tensor

from fastllama.errors import nearest, shown
from fastllama.kernels.dispatch.plainness import is_plain
from fastllama.layers.linear import PackedLinear
from fastllama.layers.model import LlamaForCausalLM
from fastllama.layers.tensor_names import is_foreign, is_recomputed
from fastllama.layers.weights import EMBEDDING, HEAD, Slot, misplaced, slots, unfit


def update_weights(model: LlamaForCausalLM, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> bool:
    """Overwrite a model's weights with Hugging Face tensors, in place; packed layers are packed again.

    tensors: some or all of those that `load_weights` takes, each whole, in float32, bfloat16, float16 or float64 on any
    device; q, k, v and gate, up may be separate. The model then equals, bit for bit, one loaded and packed with all of
    its new weights; layers keep their kind. Either name fills the matrix of tied embeddings; if both occur they must be
    equal. Update all weights or none of a model quantized by AWQ or SmoothQuant, which moved scales between weights.

    A collection (a dict, a list) is checked as a whole before anything is written. Each tensor of an iterator is
    checked, copied and released before the next is read, so that most tensors before an illegal one are written.
    Memory besides the tensors: about twice the weight of the largest packed layer. A fused layer is packed once if its
    parts are consecutive; in bf12 a separate part takes about seven times as long.

    Every parameter and buffer keeps its memory, and captured decode steps stay valid, with one exception: in bf12 the
    number of outliers and the exponent follow the weights. Returns whether these changed in any layer: captured steps
    are then invalid and must be dropped, also if this raises while it reads an iterator. The caller must evict cached
    keys and values of the old weights; no step may be in flight.

    Raises TypeError for an item that is not a name with a tensor. Raises ValueError that names the tensor if it is
    unknown, appears twice, has the wrong shape or dtype, holds NaN or infinity, exceeds the model's dtype, or is not a
    plain tensor with data. Tables that follow from the configuration and undeclared biases of zeros are skipped.
    """
    at_once = isinstance(tensors, Collection)
    items = tensors.items() if isinstance(tensors, Mapping) else tensors
    checked: Iterable[tuple[Slot, Tensor]] = _checked(model, items, at_once)
    if at_once:
        checked = list(checked)
    replaced = False
    for name, parts in groupby(checked, key=lambda part: part[0].parameter):
        path, _, kind = name.rpartition(".")
        layer = model.get_submodule(path)
        if kind == "weight" and isinstance(layer, PackedLinear):
            replaced |= _pack(layer, model.dtype, parts)
        else:
            _copy(getattr(layer, kind), parts)
    return replaced


def _checked(
    model: LlamaForCausalLM, items: Iterable[tuple[str, Tensor]], at_once: bool
) -> Iterator[tuple[Slot, Tensor]]:
    """The tensors to write, each checked as it is read. at_once: all are checked before the first is written."""
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
            del tensor
        elif first == name:
            raise ValueError(f"tensor {shown(name)} appears twice; legal: each name once")
        elif not torch.equal(tensor.to(model.embed_tokens.weight), tied.to(model.embed_tokens.weight)):
            raise ValueError(f"tensor {name} differs from {first}; legal: equal values, for the two are tied")


def _unplaced(model: LlamaForCausalLM, table: Collection[str], name: str, tensor: Tensor) -> str | None:
    """Why a tensor with an unknown name is refused; None for an undeclared bias of zeros, which may be skipped."""
    if not is_foreign(name):
        return misplaced(name, tensor, model.config)
    hint = nearest(name, table, 0.8)
    meant = f" (did you mean {hint!r}?)" if hint else ""
    return f"is unexpected: outside of the Llama{meant}; legal: names such as {EMBEDDING}"


def _trouble(model: LlamaForCausalLM, slot: Slot, tensor: Tensor) -> str | None:
    """Why a tensor cannot be written to a slot; None if it can."""
    if not is_plain([tensor]) or tensor.layout != torch.strided:
        kind = f"{type(tensor).__name__} of layout {tensor.layout} on {tensor.device}"
        return f"of shape {list(tensor.shape)} is a {kind}; legal: plain tensors with data, such as full_tensor() gives"
    path, _, kind = slot.parameter.rpartition(".")
    layer = model.get_submodule(path)
    packed = kind == "weight" and isinstance(layer, PackedLinear)
    columns = (layer.in_features,) if packed else getattr(layer, kind).shape[1:]
    return unfit(tensor, slot, (slot.rows, *columns), model.dtype)


def _copy(weight: Tensor, parts: Iterable[tuple[Slot, Tensor]]) -> list[Slot]:
    """Copy tensors to their rows of a weight, each before the next is read. Returns their slots."""
    found = []
    for slot, tensor in parts:
        with torch.inference_mode():
            weight[slot.start : slot.start + slot.rows].copy_(tensor)
        found.append(slot)
        del tensor
    return found


def _pack(layer: PackedLinear, dtype: torch.dtype, parts: Iterable[tuple[Slot, Tensor]]) -> bool:
    """Pack new rows of a layer. Returns whether buffers were replaced."""
    device = next(layer.buffers()).device
    weight = torch.empty(layer.out_features, layer.in_features, dtype=dtype, device=device)
    found = _copy(weight, parts)
    if sum(slot.rows for slot in found) == layer.out_features:
        ranges = [(0, layer.out_features)]
    else:
        ranges = [(slot.start, slot.start + slot.rows) for slot in found]
    replaced = False
    with torch.inference_mode():
        for start, end in ranges:
            replaced |= layer.set_rows(start, weight[start:end])
    return replaced
