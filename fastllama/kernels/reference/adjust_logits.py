"""Logit biases and penalties of requests, applied before sampling."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastllama.kernels.reference.numerics import wide


def adjust_logits(
    logits: Tensor,
    tokens: Tensor,
    starts: Tensor,
    ends: Tensor,
    slots: Tensor,
    bias: Tensor,
    counts: Tensor,
    repetition_penalty: Tensor,
    presence_penalty: Tensor,
    frequency_penalty: Tensor,
) -> Tensor:
    """Logits [R, V] with the bias of each row's slot, and its penalties for tokens in the prompt or generated.

    A row whose slot is negative is returned unchanged; a row whose slot is past the tables is NaN. Bounds beyond
    tokens [T] and ids outside of the vocabulary are ignored.
    """
    x = wide(logits)
    num_slots, vocab = bias.shape
    if not num_slots:
        return torch.where(slots[:, None] < 0, x, math.nan)
    rows = slots.clamp(0, num_slots - 1)
    counted = counts[rows]
    generated = (counted >> 1) + _occurrences(tokens, starts, ends, vocab)
    seen = (counted != 0) | (generated > 0)
    bias, (repetition, presence, frequency) = (
        bias[rows].to(x.dtype),
        (each[:, None].to(x.dtype) for each in (repetition_penalty, presence_penalty, frequency_penalty)),
    )
    biased = torch.where(bias.isfinite(), _bounded(x, x + bias), x + bias)
    repeated = torch.where(biased > 0, biased / repetition, biased * repetition)
    penalised = torch.where(seen, _bounded(biased, repeated), biased)
    # One subtraction: two could overflow to -inf and then to NaN.
    less = penalised - (presence + frequency * generated)
    adjusted = torch.where(generated > 0, _bounded(penalised, less), penalised)
    adjusted = torch.where(slots[:, None] < num_slots, adjusted, math.nan)
    return torch.where(slots[:, None] < 0, x, adjusted)


def _occurrences(tokens: Tensor, starts: Tensor, ends: Tensor, vocab: int) -> Tensor:
    """How often each id occurs in tokens[starts[r] : ends[r]]: [R, V] int32."""
    places = torch.arange(tokens.shape[0], dtype=torch.int64, device=tokens.device)
    legal = (tokens >= 0) & (tokens < vocab)
    taken = (places >= starts[:, None]) & (places < ends[:, None]) & legal  # [R, T]
    found = torch.zeros(starts.shape[0], vocab, dtype=torch.int32, device=tokens.device)
    return found.scatter_add_(1, tokens.clamp(0, vocab - 1).expand(taken.shape), taken.int())


def _bounded(x: Tensor, changed: Tensor) -> Tensor:
    """`changed`, clamped to a quarter of the largest number, where x is finite; x itself where it is not."""
    limit = torch.finfo(x.dtype).max / 4
    return torch.where(x.isfinite(), changed.clamp(-limit, limit), x)
