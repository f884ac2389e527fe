"""Drawing one token in explicit formulas, row by row, on plain integers and sorted probabilities."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class Draw:
    """The parameters of one row of kernels.sample."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    offset: int


def uniform(seed: int, offset: int) -> float:
    """The number in [0, 1) of key `seed` and counter `offset`: Philox4x32-10 (Salmon et al., 2011), first word.

    The word, read as a signed integer, is folded at zero and scaled to fp32, as Triton's tl.rand does.
    """
    words = [offset & _WORD, 0, 0, 0]
    keys = [seed & _WORD, seed >> 32 & _WORD]
    for _ in range(10):
        a, b = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        words = [b >> 32 ^ words[1] ^ keys[0], b & _WORD, a >> 32 ^ words[3] ^ keys[1], a & _WORD]
        keys = [(keys[0] + 0x9E3779B9) & _WORD, (keys[1] + 0xBB67AE85) & _WORD]
    word = words[0]
    folded = word if word < 1 << 31 else _WORD - word
    as_fp32 = functools.partial(torch.tensor, dtype=torch.float32, device="cpu")
    return (as_fp32(folded) * as_fp32(4.6566127342e-10)).item()


def candidates(logits: Tensor, draw: Draw) -> Tensor:
    """Probabilities [V] of the tokens that may be drawn, 0 for the others: temperature, top-k, top-p, min-p in turn."""
    probs = (logits / draw.temperature).softmax(-1)
    if 0 < draw.top_k < probs.shape[0]:
        probs = probs.where(probs >= probs.sort(descending=True).values[draw.top_k - 1], 0)
    if draw.top_p < 1:
        ranked = probs.sort(descending=True).values
        enough = ranked.cumsum(0) >= draw.top_p * ranked.sum()
        probs = probs.where(probs >= ranked[enough.int().argmax()], 0)
    return probs.where(probs >= draw.min_p * probs.max(), 0)


def take(logits: Tensor, draw: Draw) -> int:
    """The token: the first likeliest at temperature 0, else the first at which the summed mass passes the number."""
    if draw.temperature == 0:
        return int(logits.argmax())
    mass = candidates(logits, draw).cumsum(0)
    return int((mass > uniform(draw.seed, draw.offset) * mass[-1]).int().argmax())


def miss(token: int, logits: Tensor, draw: Draw) -> float:
    """How far from `token`'s share of the mass the number fell, from 0 (right) to 1; logits [V] in fp64.

    A token drawn across a boundary, by rounding, misses by about that rounding; one that may not be drawn, by 1.
    """
    if draw.temperature == 0:
        return float(token != take(logits, draw))
    probs = candidates(logits, draw)
    if not 0 <= token < probs.shape[0] or probs[token] == 0:
        return 1.0
    mass = probs.cumsum(0) / probs.sum()
    number = uniform(draw.seed, draw.offset)
    return max(float(mass[token] - probs[token] / probs.sum()) - number, number - float(mass[token]), 0.0)
