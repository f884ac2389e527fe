"""Rotary frequencies of a configuration, and the cos/sin cache that the ops read."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastllama.kernels import cos_sin_cache
from fastllama.layers.config import LlamaConfig, RopeScaling
from fastllama.layers.rope_scaling import yarn_attention_factor


def inverse_frequencies(config: LlamaConfig, max_model_len: int) -> Tensor:
    """Angular frequencies [head_dim / 2] fp32, radians per position, computed in fp32 as Meta and Hugging Face do.

    Dynamic NTK scaling computes its base from max_model_len once, so that cached keys stay valid: within the trained
    context that is the plain base; beyond it, transformers changes the base with every new length instead.
    Sources: linear, Chen et al. 2023; dynamic NTK, bloc97 2023; llama3, the Llama 3.1 model card; YaRN, Peng et al.
    2023.
    """
    theta, scaling, dim = config.rope_theta, config.rope_scaling, config.head_dim
    if scaling is not None and scaling.kind == "dynamic":
        trained = config.max_position_embeddings
        stretch = scaling.factor * max(max_model_len, trained) / trained - (scaling.factor - 1)
        theta *= stretch ** (dim / (dim - 2))
    inv_freq = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim))
    if scaling is None or scaling.kind == "dynamic":
        return inv_freq
    if scaling.kind == "linear":
        return inv_freq / scaling.factor
    kept = _llama3(inv_freq, scaling) if scaling.kind == "llama3" else _yarn(inv_freq, theta, scaling)
    return inv_freq * (kept + (1 - kept) / scaling.factor)


def rotary_cache(config: LlamaConfig, max_model_len: int, device: torch.device | str) -> Tensor:
    """cos_sin [max_model_len, head_dim] fp32 for kernels.rope, times YaRN's attention factor for YaRN."""
    cache = cos_sin_cache(inverse_frequencies(config, max_model_len), max_model_len)
    return cache.mul_(attention_factor(config)).to(device)


def attention_factor(config: LlamaConfig) -> float:
    """The factor of cosines and sines: 1 except for YaRN, which preserves the entropy of attention over more keys."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    given = scaling.attention_factor
    return yarn_attention_factor(scaling.factor) if given is None else given


def _llama3(inv_freq: Tensor, scaling: RopeScaling) -> Tensor:
    """The unscaled share of each frequency: 1 for short wavelengths, 0 for long ones, a ramp between."""
    assert scaling.original_max_position_embeddings is not None
    turns = scaling.original_max_position_embeddings * inv_freq / (2 * math.pi)  # within the trained context
    return ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)


def _yarn(inv_freq: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """The unscaled share of each frequency: a ramp over the dimensions between beta_fast and beta_slow turns."""
    half, trained = inv_freq.shape[0], scaling.original_max_position_embeddings
    assert trained is not None

    def dimension(turns: float) -> float:
        """The fractional index of the frequency with this many turns within the trained context."""
        return half * math.log(trained / (2 * math.pi * turns)) / math.log(theta)

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)  # as published: counts dimensions, although indices are of pairs
    index = torch.arange(half, dtype=torch.float32, device="cpu")
    return 1 - ((index - low) / (high - low or 0.001)).clamp(0, 1)
