"""Attention and rotation by their formulas in fp64, one sequence at a time, in flash-attn's shapes."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """q [Sq, H, D], k and v [Sk, Hkv, D] -> out [Sq, H, D], log-sum-exp [H, Sq]; 0 and +inf where a row sees no key."""
    group = q.shape[1] // k.shape[1]
    keys, values = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else scale
    scores = torch.einsum("qhd,khd->hqk", q.double(), keys) * scale
    if causal:
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(k.shape[0] - q.shape[0] + 1)
        scores = scores.masked_fill(hidden, -math.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().nan_to_num(0.0)
    return torch.einsum("hqk,khd->qhd", weights, values), lse.masked_fill(lse == -math.inf, math.inf)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """x [S, H, D] by the angles [max, R / 2] at positions [S], rounded to x's dtype as a cache holds it."""
    half = cos.shape[1]
    turned, rest = x[..., : 2 * half].double(), x[..., 2 * half :]
    c, s = (angles[positions].double()[:, None] for angles in (cos, sin))
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.split(half, -1)
    pair = a * c - b * s, a * s + b * c
    result = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((result.to(x.dtype), rest), -1)


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype, largest: float = 1.0) -> None:
    """Equal to 16 roundings to `dtype` of numbers up to `largest`.

    Weights and the result are rounded once each; a score up to 4, of a query and a key that a rotation may have
    rounded, carries a handful more into its weight.
    """
    bound = 16 * torch.finfo(dtype).eps * max(largest, 1.0)
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=bound)


def largest(x: Tensor) -> float:
    """The largest magnitude, 0 of nothing."""
    return float(x.abs().amax()) if x.numel() else 0.0
