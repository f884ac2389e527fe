"""Loads the tensors of a checkpoint into a model one by one: each weight is allocated, filled and packed on arrival."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastllama.errors import CheckpointError, counted, shown
from fastllama.layers.linear import Linear, PackedLinear, parameter
from fastllama.layers.model import LlamaForCausalLM
from fastllama.layers.packing import Packer, is_tied
from fastllama.layers.quantized import LINEARS, QuantizedLinear
from fastllama.layers.tensor_names import is_foreign, is_quantized, is_recomputed
from fastllama.layers.weights import EMBEDDING, HEAD, Slot, misplaced, misshapen, slots, unfit
from fastllama.quant.weight import QuantizedWeight

logger = logging.getLogger("fastllama")

_CLASSIFIER = "score.weight"  # of LlamaForSequenceClassification and reward models


def load_weights(
    model: LlamaForCausalLM,
    tensors: Iterable[tuple[str, Tensor | QuantizedWeight]],
    *,
    file_of: Callable[[str], object] | None = None,
    device: torch.device | None = None,
    pack: Packer | None = None,
) -> None:
    """Copy Hugging Face tensors into the model, cast to each parameter's dtype; each is checked before it is written.

    A quantized weight replaces its Linear by a layer of its kind; q, k, v (gate, up) must have the same form. device:
    where parameters on the meta device are allocated, each with its first rows. pack: replaces each Linear once its
    weight is complete, so that memory peaks at the packed model and one weight.

    Tables that follow from the configuration are skipped. Tensors outside of every Llama, such as a value head, are
    logged, as are undeclared biases that are zero, and missing declared biases, which become zero. `file_of` returns
    the file of a tensor for messages. Raises CheckpointError for a tensor that is unexpected, missing, of the wrong
    shape or dtype, holds NaN or infinity, exceeds the parameter's dtype, or appears twice with different values.
    (transformers loads a file with an unexpected or a missing weight, and warns.)
    """
    _Loading(model, file_of, device, pack).run(tensors)


class _Loading:
    def __init__(
        self,
        model: LlamaForCausalLM,
        file_of: Callable[[str], object] | None,
        device: torch.device | None,
        pack: Packer | None,
    ) -> None:
        self._model, self._file_of, self._device, self._pack = model, file_of, device, pack
        self._dtype = model.dtype
        self._missing = slots(model.config)
        self._table = dict(self._missing)
        if model.config.tie_word_embeddings:  # either name fills the shared matrix
            self._table[HEAD] = self._table[EMBEDDING]
        self._awaited = Counter(slot.parameter for slot in self._missing.values())  # missing tensors of each parameter
        self._written: set[Slot] = set()
        self._skipped: list[str] = []
        self._zeros: list[str] = []

    @torch.no_grad()
    def run(self, tensors: Iterable[tuple[str, Tensor | QuantizedWeight]]) -> None:
        for name, tensor in tensors:
            if (slot := self._table.get(name)) is not None:
                self._take(name, slot, tensor)
            elif not self._passes_over(name, tensor):
                self._zeros.append(name)
        self._finish()

    def _passes_over(self, name: str, tensor: Tensor | QuantizedWeight) -> bool:
        """Whether to skip a tensor without a slot: a recomputed table, or one outside of every Llama.

        False for an undeclared bias of zeros. Raises CheckpointError for any other tensor.
        """
        if is_recomputed(name):
            return True
        if is_foreign(name) and not is_quantized(name):
            self._skipped.append(name)
            return True
        kept = tensor.scales if isinstance(tensor, QuantizedWeight) else tensor
        if trouble := misplaced(name, kept, self._model.config):
            raise self._fail(name, trouble)
        return False

    def _take(self, name: str, slot: Slot, tensor: Tensor | QuantizedWeight) -> None:
        path, _, leaf = slot.parameter.rpartition(".")
        layer = self._model.get_submodule(path)
        again = slot in self._written
        if isinstance(tensor, QuantizedWeight):
            same = self._write_quantized(name, slot, layer, tensor, again)
        else:
            same = self._write(name, slot, layer, leaf, tensor, again)
        if not same:
            tied = (
                f" ({EMBEDDING} and {HEAD} are tied)" if slot == self._table.get(HEAD) == self._table[EMBEDDING] else ""
            )
            raise self._fail(name, f"appears twice, with different values{tied}")
        if not again:
            self._written.add(slot)
            self._awaited[slot.parameter] -= 1
            if not self._awaited[slot.parameter] and leaf == "weight":
                self._complete(path)

    def _write(self, name: str, slot: Slot, layer: Any, leaf: str, tensor: Tensor, again: bool) -> bool:
        """Write a tensor. Returns False if it was written before, with other values."""
        packed = leaf == "weight" and isinstance(layer, PackedLinear)
        shape = (slot.rows, layer.in_features) if packed else (slot.rows, *getattr(layer, leaf).shape[1:])
        if trouble := unfit(tensor, slot, shape, self._dtype):
            raise self._fail(name, trouble)
        if packed:
            if not again:
                raise self._fail(name, f"is not quantized, and what it is fused with is: {layer.form}")
            return layer.holds(slot.start, tensor.to(next(layer.buffers()).device, self._dtype))
        target = self._allocated(layer, leaf)[slot.start : slot.start + slot.rows]
        if again:
            return torch.equal(tensor.to(target), target)
        target.copy_(tensor)
        return True

    def _write_quantized(self, name: str, slot: Slot, layer: Any, rows: QuantizedWeight, again: bool) -> bool:
        if not isinstance(layer, (Linear, QuantizedLinear)):
            raise self._fail(name, f"is quantized ({rows.form}); legal of linear layers alone")
        columns = layer.weight.shape[1] if isinstance(layer, Linear) else layer.in_features
        if trouble := misshapen(rows.shape, slot, (slot.rows, columns)):
            raise self._fail(name, trouble)
        if not rows.scales.isfinite().all():
            raise self._fail(name, "has scales of NaN or infinity; the file is damaged")
        if rows.scales.dtype not in (self._dtype, torch.float32):  # a dtype that the ops accept, without rounding
            rows = replace(rows, scales=rows.scales.float())
        if isinstance(layer, Linear):
            layer = self._quantized(name, slot, layer, rows)
        if rows.form != layer.form:
            raise self._fail(
                name, f"is {rows.form}, and what it is fused with is {layer.form}; legal: the same of both"
            )
        device = layer.packed.device
        zeros = None if rows.zeros is None else rows.zeros.to(device)
        rows = replace(rows, values=rows.values.to(device), scales=rows.scales.to(device), zeros=zeros)
        if again:
            return rows.equals(layer.quantized_rows(slot.start, slot.rows))
        layer.set_quantized_rows(slot.start, rows)
        return True

    def _quantized(self, name: str, slot: Slot, linear: Linear, rows: QuantizedWeight) -> QuantizedLinear:
        """Replace a Linear by an empty layer of a quantized weight's kind."""
        if is_tied(self._model, linear) or any(each.parameter == slot.parameter for each in self._written):
            raise self._fail(name, f"is {rows.form}, and what it is fused or tied with is not quantized")
        place = self._place(linear.weight)
        layer = LINEARS[rows.kind].empty_like(rows, linear.weight.shape[0], linear.bias, place)
        self._model.set_submodule(slot.parameter.rpartition(".")[0], layer)
        return layer

    def _allocated(self, layer: Any, leaf: str) -> Tensor:
        """A parameter, allocated if it is on the meta device."""
        held: Tensor = getattr(layer, leaf)
        if held.is_meta:
            made = parameter(*held.shape, dtype=held.dtype, device=self._place(held))
            head = self._model.lm_head
            if held is self._model.embed_tokens.weight and isinstance(head, Linear) and is_tied(self._model, head):
                head.weight = made
            setattr(layer, leaf, made)
            return made
        return held

    def _place(self, held: Tensor) -> torch.device:
        """The device for a parameter's values."""
        return (self._device or torch.device("cpu")) if held.is_meta else held.device

    def _complete(self, path: str) -> None:
        """Pack a layer whose weight is complete."""
        linear = self._model.get_submodule(path)
        if self._pack is not None and isinstance(linear, Linear) and not is_tied(self._model, linear):
            with torch.inference_mode():
                packed = self._pack(linear)
            if packed is not None:
                self._model.set_submodule(path, packed)

    def _finish(self) -> None:
        absent = [name for name, slot in self._missing.items() if slot not in self._written]
        biases = [name for name in absent if name.endswith(".bias")]
        if len(biases) < len(absent):
            raise self._fail(*self._what_is_missing([name for name in absent if name not in biases]))
        for name in biases:
            slot = self._missing[name]
            path, _, leaf = slot.parameter.rpartition(".")
            self._allocated(self._model.get_submodule(path), leaf)[slot.start : slot.start + slot.rows] = 0
        _log(self._skipped, "outside of the Llama, and not loaded")
        _log(self._zeros, "not loaded: the configuration declares no such bias, and its values are all zero")
        _log(biases, "missing, and taken as zero, as in transformers")

    def _what_is_missing(self, absent: list[str]) -> tuple[str, str]:
        first, *rest = absent
        others = f", and so {'is' if len(rest) == 1 else 'are'} {counted(len(rest), 'other')}" if rest else ""
        if prefixed := [name for name in self._skipped if name.endswith(f".{first.removeprefix('model.')}")]:
            return first, f"is missing{others}; names here begin otherwise: {shown(prefixed[0])}"
        if absent == [HEAD] and _CLASSIFIER in self._skipped:
            return first, f"is missing, and {_CLASSIFIER} is there: a classifier, which writes no text"
        if absent == [HEAD]:
            return (
                first,
                "is missing, and the configuration has tie_word_embeddings=False; the checkpoint is incomplete",
            )
        return first, f"is missing{others}; the checkpoint is incomplete"

    def _fail(self, name: str, trouble: str) -> CheckpointError:
        origin = f"{self._file_of(name)}: " if self._file_of else ""
        return CheckpointError(f"{origin}tensor {shown(name)} {trouble}")


def _log(names: list[str], what: str) -> None:
    if names:
        others = f" and {len(names) - 1} more are" if names[1:] else " is"
        logger.warning("tensor %s%s %s", shown(names[0]), others, what)
