"""Rotary frequencies of a configuration, and the cos/sin cache the ops read."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastllama.kernels import cos_sin_cache
from fastllama.layers.config import LlamaConfig, RopeScaling


def inverse_frequencies(config: LlamaConfig, max_model_len: int) -> Tensor:
    """Angular frequencies [head_dim / 2] fp32, radians per position, computed in fp32 as Meta and Hugging Face do.

    Dynamic NTK scaling takes its base from max_model_len once, so that cached keys stay valid: within the trained
    context that is the plain base; beyond it, transformers moves the base with every new length instead.
    Sources: linear, Chen et al. 2023; dynamic NTK, bloc97 2023; llama3, the Llama 3.1 model card.
    """
    theta, scaling, dim = config.rope_theta, config.rope_scaling, config.head_dim
    if scaling is not None and scaling.kind == "dynamic":
        trained = scaling.original_max_position_embeddings or config.max_position_embeddings
        stretch = scaling.factor * max(max_model_len, trained) / trained - (scaling.factor - 1)
        theta *= stretch ** (dim / (dim - 2))
    inv_freq = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim))
    if scaling is not None and scaling.kind == "linear":
        inv_freq = inv_freq / scaling.factor
    if scaling is not None and scaling.kind == "llama3":
        inv_freq = _llama3(inv_freq, scaling)
    return inv_freq


def rotary_cache(config: LlamaConfig, max_model_len: int, device: torch.device | str) -> Tensor:
    """cos_sin [max_model_len, head_dim] fp32 for kernels.rope."""
    return cos_sin_cache(inverse_frequencies(config, max_model_len), max_model_len).to(device)


def _llama3(inv_freq: Tensor, scaling: RopeScaling) -> Tensor:
    """Long wavelengths are stretched by the factor, short ones kept, those between blended."""
    assert scaling.original_max_position_embeddings is not None
    turns = scaling.original_max_position_embeddings * inv_freq / (2 * math.pi)  # within the trained context
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0, 1)
    return inv_freq * (blend + (1 - blend) / scaling.factor)
