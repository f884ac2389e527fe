"""Quantizes a model in place, with methods that use the linear layers' inputs over a calibration text."""

from __future__ import annotations

import copy
import hashlib
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastllama import __version__
from fastllama.errors import brief, check_choice, counted
from fastllama.layers.block import LlamaBlock
from fastllama.layers.calibration import Calibration
from fastllama.layers.config import LlamaConfig
from fastllama.layers.linear import Linear
from fastllama.layers.model import LlamaForCausalLM, runners
from fastllama.layers.quantization import WITHOUT_TEXT, check_method
from fastllama.layers.quantized import LINEARS as KINDS
from fastllama.layers.rescaling import LINEARS, rescale, tied
from fastllama.progress import progress_bar
from fastllama.quant.activations import Activations
from fastllama.quant.gptq import gptq
from fastllama.quant.hqq import hqq
from fastllama.quant.rounding import clipped, on_grid, round_to_nearest
from fastllama.quant.scaling import awq_scales, smoothquant_scales
from fastllama.quant.weight import QuantizedWeight


class Finished(Protocol):
    """A store of finished blocks; a key is the hash of all that a block is computed from.

    The tensors are the model's own and must be written or copied at once.
    """

    def get(self, key: str) -> Mapping[str, Tensor] | None:
        """The tensors that `put` stored under this key; None without any."""

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Store a block's tensors."""


@torch.no_grad()
def quantize(
    model: LlamaForCausalLM,
    scheme: str = "int4",
    method: str = "gptq",
    *,
    documents: Sequence[Sequence[int]] = (),
    group_size: int | None = None,
    device: torch.device | str | None = None,
    finished: Finished | None = None,
    progress: bool | None = None,
) -> None:
    """Quantize the linear layers of a model's blocks, in place; embeddings, norms and output head stay dense.

    scheme: "int4", "int8" or "w8a8", which also quantizes activations to 8 bits at each call. method: "rtn" (round to
    nearest), "hqq" (zeros and scales fitted to each weight), or calibrated with documents: "gptq" for all schemes,
    "awq" and "awq+gptq" for int4, "smoothquant" and "smoothquant+gptq" for w8a8. documents: token ids of a text like
    those that the model is for, each document starting as prompts do; unused by "rtn" and "hqq". group_size: columns
    that share a scale: 32, 64, 128 or -1, whole rows; None is 128 for int4 and whole rows for the others. A layer whose
    columns it does not divide has the largest smaller group size that does, or whole rows. device: where blocks are
    computed; None is the model's. finished: a store of finished blocks: a call with the same weights, documents and
    arguments resumes an earlier one. progress: a bar on stderr; None: on a terminal only.

    Each block is calibrated with the inputs of the dense model, so that the result does not depend on which blocks are
    finished. The result is bit-identical for the same model, documents, device and number of threads. Memory beside the
    model: one block in fp32, its Hessians (4 K^2 bytes, of which GPTQ takes three at once), a few copies of its widest
    weight, and the residual stream of all tokens.
    "awq" and "smoothquant" move scales between weights, so that a partial update (`LLM.update_weights`) would mix two
    models: update all weights, or none.
    Raises TypeError or ValueError for any argument, ValueError for layers that are packed already, a model that an LLM
    runs, a text that makes a layer's input infinite, or weights that are not finite. After an exception or Ctrl-C,
    finished blocks remain quantized: load the model anew to resume from `finished`.
    """
    check_method(scheme, method, group_size)
    _check_model(model)
    check_documents(model.config, documents, method)
    place = model.device if device is None else torch.device(device)
    check_choice("device type", place.type, ("cpu", "cuda"))
    recipe = _Recipe(model.config, scheme, method, group_size, model.dtype)
    calibration = Calibration(model, documents, place) if recipe.reads_text else None
    store = None if finished is None else _Store(finished, recipe, model, documents, place)
    with progress_bar("Quantizing", progress, total=len(model.layers) * len(LINEARS), unit="layer") as bar:
        for number, block in enumerate(model.layers):
            assert isinstance(block, LlamaBlock)
            tensors = None if store is None else store.get(block)
            made = copy.deepcopy(block).to(place)
            _check_weights(number, made)
            seen = recipe.watchers(made, calibration) if tensors is None else {}
            if calibration:
                calibration.run(made, seen)
                _check_finite(number, seen, model.dtype)
            if tensors is None:
                try:
                    recipe.quantize(made.float(), seen, bar.update)
                except ValueError as error:
                    raise ValueError(f"layers.{number}: {error}") from None
                if store is not None:
                    store.put(made)
            else:
                _restore(made, tensors, scheme)
                bar.update(len(LINEARS))
            model.layers[number] = made.to(model.device)


@dataclass(frozen=True)
class _Recipe:
    """How each block is quantized. dtype: of the model, and of the scales, norms and biases in the result."""

    config: LlamaConfig
    scheme: str
    method: str
    group_size: int | None
    dtype: torch.dtype

    @property
    def reads_text(self) -> bool:
        """Whether the method is calibrated with a text."""
        return self.method not in WITHOUT_TEXT

    def watchers(self, block: LlamaBlock, calibration: Calibration | None) -> dict[str, Activations]:
        """Activations for each linear layer, to collect its input."""
        if calibration is None:
            return {}
        hessian = self.method.endswith("gptq")
        weights = {name: block.get_parameter(f"{name}.weight") for name in LINEARS}
        return {
            name: Activations(weight.shape[1], calibration.num_tokens, weight.device, hessian=hessian)
            for name, weight in weights.items()
        }

    def quantize(self, block: LlamaBlock, seen: dict[str, Activations], done: Callable[[], Any]) -> None:
        """Quantize a block's layers in fp32, in place, freeing each one's activations; done: called after each."""
        scales = {name: self._scales(name, block, seen[name]) for name in LINEARS} if self._scales_inputs else {}
        for name, found in scales.items():
            seen[name].divide(rescale(block, self.config, name, found, self.dtype))
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.to(self.dtype)
        for name in LINEARS:
            linear = block.get_submodule(name)
            assert isinstance(linear, Linear)
            weight = self._rounded(linear.weight.detach(), seen.pop(name, None))
            block.set_submodule(name, KINDS[self.scheme].of(weight, linear.to(self.dtype).bias))
            done()

    @property
    def _scales_inputs(self) -> bool:
        return self.method.startswith(("awq", "smoothquant"))

    def _scales(self, name: str, block: LlamaBlock, seen: Activations) -> Tensor:
        """Scales [K] of a layer's input channels."""
        weight, rows = block.get_parameter(f"{name}.weight"), seen.rows
        if self.method.startswith("awq"):
            magnitudes = tied(self.config, name, seen.absmean, "mean")
            return awq_scales(weight, rows, magnitudes, lambda each: self._nearest(each).dequantize())
        magnitudes = tied(self.config, name, seen.absmax, "amax")
        return smoothquant_scales(weight, rows, magnitudes, tied(self.config, name, weight.abs().amax(0), "amax"))

    def _nearest(self, weight: Tensor) -> QuantizedWeight:
        """A weight in fp32, rounded to nearest, with scales in fp32."""
        return round_to_nearest(weight, self.scheme, self.group_size)

    def _rounded(self, weight: Tensor, seen: Activations | None) -> QuantizedWeight:
        """The quantized weight of a layer, from its weight in fp32."""
        if self.method == "hqq":
            return hqq(weight, self.group_size, self.dtype)
        nearest = self._nearest(weight)
        start = replace(nearest, scales=nearest.scales.to(self.dtype))
        if seen is None or not self.method.endswith("gptq"):
            return on_grid(weight, start)
        return gptq(weight, seen.hessian, clipped(weight, start) if self.scheme == "int4" else start)


class _Store:
    """Finished blocks by hash: of the arguments, the text, and the weights up to the block."""

    def __init__(
        self,
        finished: Finished,
        recipe: _Recipe,
        model: LlamaForCausalLM,
        documents: Sequence[Sequence[int]],
        device: torch.device,
    ) -> None:
        self._finished = finished
        self._hash = hashlib.sha256(repr((__version__, recipe, device.type)).encode())
        if recipe.reads_text:
            self._hash.update(repr([[*map(int, ids)] for ids in documents]).encode())
            self._add(model.embed_tokens)

    def get(self, block: LlamaBlock) -> Mapping[str, Tensor] | None:
        """The tensors of the model's next block, if it was finished before."""
        self._add(block)
        return self._finished.get(self._hash.hexdigest())

    def put(self, block: LlamaBlock) -> None:
        """Store the quantized block, under the key of the last `get`."""
        self._finished.put(self._hash.hexdigest(), block.state_dict())

    def _add(self, module: nn.Module) -> None:
        for parameter in module.parameters():
            values: Any = parameter.detach().cpu().contiguous().view(torch.uint8).numpy()
            self._hash.update(values)


def _restore(block: LlamaBlock, tensors: Mapping[str, Tensor], scheme: str) -> None:
    """Replace the layers of a dense block by quantized ones with copies of these tensors."""
    for name in LINEARS:
        linear = block.get_submodule(name)
        assert isinstance(linear, Linear)
        kept = (tensors.get(f"{name}.{each}") for each in ("packed", "scales", "zeros"))
        device, size = linear.weight.device, linear.weight.shape[1]
        packed, scales, zeros = (None if each is None else torch.empty_like(each, device=device) for each in kept)
        assert packed is not None
        assert scales is not None
        block.set_submodule(name, KINDS[scheme](packed, scales, size, linear.bias, zeros))
    block.load_state_dict(dict(tensors))


def _check_model(model: LlamaForCausalLM) -> None:
    if not isinstance(model, LlamaForCausalLM):
        raise TypeError(f"model is a {type(model).__name__}; legal: a LlamaForCausalLM, as load_model gives")
    check_dense(model)
    if runners(model):
        raise ValueError("model is run by an LLM, whose weights would change under it; legal: one that no LLM runs")


def check_dense(model: LlamaForCausalLM) -> None:
    """Raise ValueError unless all linear layers of a model's blocks are dense."""
    for name in LINEARS:
        for block in model.layers:
            layer = block.get_submodule(name)
            if type(layer) is not Linear:
                raise ValueError(f"model has a {type(layer).__name__}; legal: dense layers, as of quantization=None")


def check_documents(config: LlamaConfig, documents: Sequence[Sequence[int]], method: str) -> None:
    """Raise TypeError or ValueError unless documents are legal for a method and a model."""
    if method in WITHOUT_TEXT:
        return
    if not hasattr(documents, "__len__"):
        raise TypeError(f"documents is {brief(documents)}; legal: a list of lists of token ids")
    if not len(documents):
        raise ValueError(f"documents is empty; legal for method {method!r}: a text, as token ids")
    longest, vocabulary = config.context_length, config.vocab_size
    for number, ids in enumerate(documents):
        if not hasattr(ids, "__len__") or (isinstance(ids, Tensor) and ids.dim() != 1):
            raise TypeError(f"document {number} is {brief(ids)}; legal: a list of token ids")
        if not 1 <= len(ids) <= longest:
            raise ValueError(f"document {number} has {counted(len(ids), 'token')}; legal: 1 to {longest}")
        wrong = [each for each in ids if not _is_token(each, vocabulary)]
        if wrong:
            raise ValueError(f"document {number} holds token {brief(wrong[0])}; legal: 0 to {vocabulary - 1}")


def _is_token(value: Any, vocabulary: int) -> bool:
    """Whether a value, which may be of NumPy or torch, is a token id of the vocabulary."""
    try:
        return 0 <= operator.index(value) < vocabulary
    except TypeError:
        return False


def _check_weights(number: int, block: LlamaBlock) -> None:
    for name, parameter in block.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"layers.{number}.{name} holds infinity or NaN; legal: finite numbers")


def _check_finite(number: int, seen: Mapping[str, Activations], dtype: torch.dtype) -> None:
    for name, activations in seen.items():
        if not activations.is_finite:
            raise ValueError(
                f"layers.{number}.{name} is fed infinity or NaN by the calibration text, in {dtype}; legal: finite "
                "numbers, as bfloat16 or float32 may give"
            )
