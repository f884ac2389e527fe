"""A reference of sampling one token in explicit formulas, row by row, with Python integers and sorted probabilities."""

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
    """Probabilities [V] after temperature, top-k, top-p and min-p, in this order; 0 for filtered tokens."""
    probs = (logits / draw.temperature).softmax(-1)
    if 0 < draw.top_k < probs.shape[0]:
        probs = probs.where(probs >= probs.sort(descending=True).values[draw.top_k - 1], 0)
    if draw.top_p < 1:
        ranked = probs.sort(descending=True).values
        enough = ranked.cumsum(0) >= draw.top_p * ranked.sum()
        probs = probs.where(probs >= ranked[enough.int().argmax()], 0)
    return probs.where(probs >= draw.min_p * probs.max(), 0)


def take(logits: Tensor, draw: Draw) -> int:
    """The first likeliest token at temperature 0, else the first whose cumulative mass passes the random number."""
    if draw.temperature == 0:
        return int(logits.argmax())
    mass = candidates(logits, draw).cumsum(0)
    return int((mass > uniform(draw.seed, draw.offset) * mass[-1]).int().argmax())


def miss(token: int, logits: Tensor, draw: Draw) -> float:
    """The distance of the random number from `token`'s interval of the mass, from 0 (right) to 1; logits [V] in fp64.

    A token across a boundary, due to rounding, misses by about that rounding; a filtered token, by 1.
    """
    if draw.temperature == 0:
        return float(token != take(logits, draw))
    probs = candidates(logits, draw)
    if not 0 <= token < probs.shape[0] or probs[token] == 0:
        return 1.0
    mass = probs.cumsum(0) / probs.sum()
    number = uniform(draw.seed, draw.offset)
    return max(float(mass[token] - probs[token] / probs.sum()) - number, number - float(mass[token]), 0.0)
