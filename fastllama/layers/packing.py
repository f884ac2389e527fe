"""Swapping a model's linear layers for ones that read fewer bytes."""

from __future__ import annotations

import torch
from tqdm import tqdm

from fastllama import kernels
from fastllama.kernels.cpu.matmul import runs_natively
from fastllama.kernels.reference.bf12 import BLOCK
from fastllama.layers.linear import Bf12Linear, Linear
from fastllama.layers.model import LlamaForCausalLM

CACHED = 1 << 26  # bytes of weights up to which packing saves little: they stay in the caches


def pays(model: LlamaForCausalLM) -> bool:
    """Whether `pack` makes decoding faster: bf16 on a CPU with the kernel and without matrix instructions for bf16."""
    return (
        model.dtype == torch.bfloat16
        and kernels.backend_of(model.device)["matmul_bf12"].backend == "numba"
        and not runs_natively(model.dtype)
        and sum(parameter.nbytes for parameter in model.parameters()) > CACHED
    )


@torch.inference_mode()
def pack(model: LlamaForCausalLM, *, progress: bool | None = None) -> None:
    """Make each Linear of a bf16 model a Bf12Linear, in place, where that takes fewer bytes; results stay the same.

    A weight shared with the embeddings stays. progress: a bar on stderr; None shows it on a terminal only. Takes 3 to
    6 s for 1e9 weights on two cores, and memory for one packed layer beside the model.
    """
    places = [  # not the layers themselves: each is to be freed when it has been packed
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, Linear) and child.weight is not model.embed_tokens.weight
    ]
    disable = None if progress is None else not progress
    for parent, name in tqdm(places, desc="Packing weights", disable=disable, leave=False):
        linear = getattr(parent, name)
        if linear.weight.shape[1] % BLOCK:
            continue
        codes, outliers, exponent = kernels.pack_bf12(linear.weight.detach())
        if codes.nbytes + outliers.nbytes < linear.weight.nbytes:
            setattr(parent, name, Bf12Linear(codes, outliers, exponent, linear.bias))
