"""Llamas with random weights in published sizes, and the bytes that a decode step reads of them."""

from __future__ import annotations

import gc
import json
from dataclasses import replace

import torch
from torch import nn

from fastllama.io.hub import resolve_model
from fastllama.layers import packing
from fastllama.layers.config import LlamaConfig
from fastllama.layers.model import LlamaForCausalLM
from fastllama.layers.quantization import quantization_of
from fastllama.runtime.device.memory import available_bytes

SHAPES = {"tiny": None, "1.1b": "tinyllama-1.1b", "7b": "llama-2-7b", "13b": "llama-2-13b", "70b": "llama-2-70b"}
FEW = 64  # vocabulary entries of a model made for its layer only


def shape(name: str, positions: int) -> LlamaConfig:
    """The configuration of one of SHAPES ("tiny" is the packaged model's), in bfloat16, with this many positions."""
    preset = SHAPES[name]
    if preset is None:
        config = LlamaConfig.from_hf(json.loads((resolve_model("tiny") / "config.json").read_text(encoding="utf-8")))
    else:
        config = LlamaConfig.preset(preset)
    return replace(config, max_position_embeddings=positions, dtype="bfloat16")


@torch.no_grad()
def random_model(config: LlamaConfig, kind: str, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    """A model with normal weights of standard deviation 1/sqrt(columns), which keeps activations in scale.

    kind: one of quantization.WORDS; each layer is packed before the next one is made, so that only the packed model
    has to fit. Uses torch's default generator of the device. Raises MemoryError where the layers do not fit.
    """
    model = _packed(replace(config, num_hidden_layers=1), kind, dtype, device)
    others = config.num_hidden_layers - 1
    check_memory("the weights", others * kept_bytes(model.layers[0]), device)
    for _ in range(others):
        model.layers.append(
            _packed(replace(config, num_hidden_layers=1, vocab_size=FEW), kind, dtype, device).layers[0]
        )
    model.config = config
    return model.eval()


def _packed(config: LlamaConfig, kind: str, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    model = LlamaForCausalLM(config, dtype, device)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter.shape[1] ** -0.5)
        else:
            parameter.uniform_(0.5, 1.5)
    packing.apply(model, quantization_of(kind), progress=False)
    return model


def kept_bytes(module: nn.Module) -> int:
    """Bytes of a module's stored weights, scales included."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def read_bytes(model: LlamaForCausalLM) -> int:
    """Bytes of the weights that a decode step reads: all but the embeddings, unless these are the output head too."""
    return sum(kept_bytes(part) for part in (model.layers, model.norm, model.lm_head))


def check_memory(what: str, needed: int, device: torch.device) -> None:
    """Raise MemoryError, with both sizes, where `needed` bytes are not free."""
    free = available_bytes(device)
    if needed > free:
        raise MemoryError(f"{what} take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")


def release(device: torch.device) -> None:
    """Free the memory of unreachable objects, and the device's cached blocks."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
