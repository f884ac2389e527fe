"""Packs a model's linear layers in place, without loss (bf12) or quantized, so that decoding reads fewer bytes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastllama import kernels
from fastllama.kernels.launch.device import runs_natively
from fastllama.kernels.reference.bf12 import BLOCK
from fastllama.layers.config import LlamaConfig
from fastllama.layers.linear import Bf12Linear, Linear, PackedLinear
from fastllama.layers.model import LlamaForCausalLM
from fastllama.layers.quantized import LINEARS, QuantizedLinear
from fastllama.progress import progress_bar
from fastllama.quant.rounding import round_to_nearest

Packer = Callable[[Linear], PackedLinear | None]
# Bytes of a packed weight, scales included: an estimate before it is made. Others keep their dtype.
PACKED = {"int4": 0.53, "int8": 1.0, "w8a8": 1.0, "bf12": 1.5}
CACHED = 1 << 26  # bytes of weights that fit into CPU caches, for which packing saves little


def expected_bytes(config: LlamaConfig, dtype: torch.dtype, kind: str | None) -> int:
    """Memory that the weights of a model packed into a kind take, with output head and embeddings in dtype."""
    tables = (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size
    layers = config.num_parameters - tables
    return int(layers * PACKED.get(kind or "", dtype.itemsize) + tables * dtype.itemsize)


def check(kind: str | None, dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError if a model of this dtype on this device cannot be packed into a kind."""
    if kind == "bf12" and (dtype, device.type) != (torch.bfloat16, "cpu"):
        raise ValueError(f"quantization is 'bf12' for {dtype} on {device}; legal: bfloat16 on a CPU")


def resolve(
    model: LlamaForCausalLM,
    quantization: str | None,
    *,
    device: torch.device | None = None,
    given: bool = False,
    kept: str | None = None,
) -> str | None:
    """Resolve `quantization` for `apply`: one of quantization.KINDS, or None, which keeps the weights unchanged.

    "auto" keeps the checkpoint's weights, but packs bf16 without loss where that `pays`; a model that was passed in and
    not loaded here is not changed. device: of the weights, for a model on the meta device. kept: the kind in which the
    weights are quantized already. Raises ValueError as `check` does, and for a kind other than `kept`.
    """
    if quantization == "auto":
        return "bf12" if not given and pays(model, device) else None
    check(quantization, model.dtype, device or model.device)
    if kept is not None and quantization not in (kept, None):
        raise ValueError(f"quantization is {quantization!r} for weights in {kept}; legal: 'auto', None or {kept!r}")
    return None if quantization == kept else quantization


def kind_of(model: LlamaForCausalLM) -> str | None:
    """The kind of the first packed layer, one of quantization.KINDS; None if no layer is packed."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            return module.kind
        if isinstance(module, Bf12Linear):
            return "bf12"
    return None


def apply(model: LlamaForCausalLM, kind: str | None, *, progress: bool | None = None) -> None:
    """Pack the linear layers into one of quantization.KINDS, in place; None leaves them. progress: as for `pack`."""
    if kind == "bf12":
        pack(model, progress=progress)
    elif kind is not None:
        quantize(model, kind, progress=progress)


def pays(model: LlamaForCausalLM, device: torch.device | None = None) -> bool:
    """Whether `pack` makes decoding faster: bf16 on a CPU with the kernel and without matrix instructions for bf16.

    device: of the weights, for a model on the meta device.
    """
    return (
        model.dtype == torch.bfloat16
        and kernels.backend_of(device or model.device)["matmul_bf12"].backend == "numba"
        and not runs_natively(model.dtype)
        and sum(parameter.nbytes for parameter in model.parameters()) > CACHED
    )


def pack(model: LlamaForCausalLM, *, progress: bool | None = None) -> None:
    """Replace each Linear of a bf16 model by a Bf12Linear where that takes fewer bytes; results are unchanged.

    A weight tied to the embeddings is not packed. progress: a bar on stderr; None shows it on a terminal only. Takes 3
    to 6 s for 1e9 weights on two cores, and memory for one packed layer beside the model.
    """
    _swap(model, _bf12, "Packing weights", progress)


def quantize(model: LlamaForCausalLM, kind: str, *, progress: bool | None = None) -> None:
    """Replace each Linear but the output head by one of `quantized.LINEARS`, rounded to nearest.

    "int4": in groups of 128, 64 or 32 columns, the first that divides them, else in whole rows. "int8" and "w8a8": in
    whole rows; w8a8 also quantizes activations at each call. The head is packed without loss where that `pays`.
    progress: as for `pack`.
    """
    _swap(model, packer(model, kind), "Quantizing weights", progress)


def packer(model: LlamaForCausalLM, kind: str | None, *, device: torch.device | None = None) -> Packer:
    """A function that packs a Linear of a model into one of quantization.KINDS; it returns None to keep the layer.

    device: of the weights, for a model on the meta device.
    """
    if kind is None:
        return lambda linear: None
    if kind == "bf12":
        return _bf12
    head, packs_head = model.lm_head, pays(model, device)

    def replace(linear: Linear) -> PackedLinear | None:
        if linear is not head:
            return LINEARS[kind].of(round_to_nearest(linear.weight.detach(), kind), linear.bias)
        return _bf12(linear) if packs_head else None

    return replace


def is_tied(model: LlamaForCausalLM, linear: Linear) -> bool:
    """Whether a layer is a head that shares the embeddings' weight, which is never packed."""
    return linear.weight is model.embed_tokens.weight


@torch.inference_mode()
def _swap(model: LlamaForCausalLM, make: Packer, title: str, progress: bool | None) -> None:
    """Replace each Linear by the result of `make`, one after another; None keeps it."""
    places = [  # not the layers themselves, so that each is freed once packed
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, Linear) and not is_tied(model, child)
    ]
    for parent, name in progress_bar(title, progress, iterable=places):
        packed = make(getattr(parent, name))
        if packed is not None:
            setattr(parent, name, packed)


def _bf12(linear: Linear) -> Bf12Linear | None:
    if linear.weight.shape[1] % BLOCK:
        return None
    codes, outliers, exponent = kernels.pack_bf12(linear.weight.detach())
    smaller = codes.nbytes + outliers.nbytes < linear.weight.nbytes
    return Bf12Linear(codes, outliers, exponent, linear.bias) if smaller else None
