"""Packs a model's linear layers, in place, so that they read fewer bytes: without loss (bf12), or quantized."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from fastllama import kernels
from fastllama.kernels.launch.device import runs_natively
from fastllama.kernels.reference.bf12 import BLOCK
from fastllama.kernels.reference.int4 import GROUPS
from fastllama.layers.linear import (
    Bf12Linear,
    CodesLinear,
    Int4Linear,
    Int8Linear,
    Linear,
    PackedLinear,
    W8A8Linear,
)
from fastllama.layers.model import LlamaForCausalLM
from fastllama.progress import progress_bar

CACHED = 1 << 26  # bytes of weights up to which packing saves little: they stay in the caches


def check(kind: str | None, dtype: torch.dtype, device: torch.device) -> None:
    """Raises ValueError if the linear layers of a model in dtype on a device cannot be packed into a kind."""
    if kind == "bf12" and (dtype, device.type) != (torch.bfloat16, "cpu"):
        raise ValueError(f"quantization is 'bf12' for {dtype} on {device}; legal: bfloat16 on a CPU")


def resolve(model: LlamaForCausalLM, quantization: str | None, *, given: bool = False) -> str | None:
    """What `apply` is to do: one of quantization.KINDS, or None, which keeps the weights as they came.

    "auto" keeps what the checkpoint brings, but packs bf16 without loss where that `pays`, and touches nothing of a
    model that was given and not loaded here. Raises ValueError where `check` does.
    """
    if quantization == "auto":
        return "bf12" if not given and pays(model) else None
    check(quantization, model.dtype, model.device)
    return quantization


def apply(model: LlamaForCausalLM, kind: str | None, *, progress: bool | None = None) -> None:
    """Pack the linear layers into one of quantization.KINDS, in place; None leaves them. progress: as for `pack`."""
    if kind == "bf12":
        pack(model, progress=progress)
    elif kind is not None:
        quantize(model, kind, progress=progress)


def pays(model: LlamaForCausalLM) -> bool:
    """Whether `pack` makes decoding faster: bf16 on a CPU with the kernel and without matrix instructions for bf16."""
    return (
        model.dtype == torch.bfloat16
        and kernels.backend_of(model.device)["matmul_bf12"].backend == "numba"
        and not runs_natively(model.dtype)
        and sum(parameter.nbytes for parameter in model.parameters()) > CACHED
    )


def pack(model: LlamaForCausalLM, *, progress: bool | None = None) -> None:
    """Make each Linear of a bf16 model a Bf12Linear, in place, where that takes fewer bytes; results stay the same.

    A weight shared with the embeddings stays. progress: a bar on stderr; None shows it on a terminal only. Takes 3 to
    6 s for 1e9 weights on two cores, and memory for one packed layer beside the model.
    """
    _swap(model, _bf12, "Packing weights", progress)


def quantize(model: LlamaForCausalLM, kind: str, *, progress: bool | None = None) -> None:
    """Make each Linear but the output head one of QUANTIZED, in place, rounded to nearest.

    "int4": in groups of 128 columns, or of 64 or 32, or of whole rows, where their number asks for it. "int8" and
    "w8a8": of whole rows; the latter rounds what is multiplied by them too, at each call. The head is packed without
    loss where that `pays`. progress: as for `pack`.
    """
    head, make, packs_head = model.lm_head, QUANTIZED[kind], pays(model)

    def replace(linear: Linear) -> PackedLinear | None:
        if linear is not head:
            return make(linear)
        return _bf12(linear) if packs_head else None

    _swap(model, replace, "Quantizing weights", progress)


@torch.inference_mode()
def _swap(
    model: LlamaForCausalLM, make: Callable[[Linear], PackedLinear | None], title: str, progress: bool | None
) -> None:
    """Put what `make` gives in each Linear's place, one after another; None leaves it."""
    places = [  # not the layers themselves: each is to be freed when it has been packed
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, Linear) and child.weight is not model.embed_tokens.weight
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


def _int4(linear: Linear) -> CodesLinear:
    size = linear.weight.shape[1]
    group = next((each for each in sorted(GROUPS, reverse=True) if size % each == 0), size)
    return _rounded(linear, Int4Linear, group)


def _rounded(linear: Linear, kind: type[CodesLinear], group_size: int | None = None) -> CodesLinear:
    size = linear.weight.shape[1]
    codes, scales = kind.quantize(linear.weight.detach(), group_size or size)
    return kind(kind.pack(codes), scales, size, linear.bias)


QUANTIZED: dict[str, Callable[[Linear], PackedLinear]] = {
    "int4": _int4,
    "int8": partial(_rounded, kind=Int8Linear),
    "w8a8": partial(_rounded, kind=W8A8Linear),
}
