"""Token sampling: temperature, top-k, top-p, min-p, and a counter-based random number for each row."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllama.kernels.reference.numerics import wide

_MASK = 0xFFFFFFFF


def _multiply_32(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b for factors below 2^32 in int64; wrapping keeps all 64 bits right."""
    product = a * b
    return (product >> 32) & _MASK, product & _MASK


def philox(seed: Tensor, offset: Tensor) -> Tensor:
    """Uniform fp32 in [0, 1) per row: the first word of Philox4x32-10 with key `seed` and counter `offset`, int64 [B].

    Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (2011); the counter's words (the low 32 bits of
    `offset`, then zeros) and the scaling are those of Triton's tl.rand, so a kernel uses the same numbers.
    """
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    c0, c1 = offset & _MASK, torch.zeros_like(offset)
    c2, c3 = torch.zeros_like(offset), torch.zeros_like(offset)
    for _ in range(10):
        high_a, low_a = _multiply_32(c0, 0xD2511F53)
        high_b, low_b = _multiply_32(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    signed = torch.where(c0 >= 1 << 31, c0 - (1 << 32), c0)
    return torch.where(signed < 0, -signed - 1, signed).float() * 4.6566127342e-10


def filter_probs(probs: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """probs [B, V] with all outside of top-k, then top-p of the rest, then min-p set to 0; not renormalised.

    Each filter keeps all tokens at least as likely as its last one, so that ties at a threshold are kept together. A
    NaN for top-p or min-p, or a negative min-p, is off; a min-p above 1 is 1, which keeps the likeliest token.
    """
    vocab = probs.shape[-1]
    ranked = probs.sort(dim=-1, descending=True).values
    last = torch.where((top_k > 0) & (top_k < vocab), top_k.long(), vocab) - 1
    floor = ranked.gather(1, last[:, None])
    mass = torch.where(ranked >= floor, ranked, 0).cumsum(-1)
    needed = (mass < top_p[:, None] * mass[:, -1:]).sum(-1, keepdim=True).clamp(max=vocab - 1)
    floor = torch.maximum(floor, torch.where(top_p[:, None] < 1, ranked.gather(1, needed), 0))
    floor = torch.maximum(floor, ranked[:, :1] * min_p.nan_to_num(0.0, posinf=1.0).clamp(0, 1)[:, None])
    return torch.where(probs >= floor, probs, 0)


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor]:
    """Token ids int64 [B] and their log-probabilities [B] under softmax(logits).

    If the temperature is 0, negative or NaN, the token is the first of the largest logits. Otherwise the token is the
    first, in vocabulary order, at which the cumulative filtered mass exceeds philox(seed, offset) of its total. An
    infinite temperature makes all tokens equally likely, except for logits of -inf. A row whose largest logit is not
    finite returns token 0 and NaN.
    """
    scores = wide(logits)
    largest = scores.amax(-1, keepdim=True)  # NaN if any is
    legal = largest.isfinite()
    # Subtracting the largest leaves softmax unchanged, and no temperature makes it overflow.
    scores = torch.where(legal, scores - largest, 0)
    greedy = ~(temperature > 0)
    tokens = scores.argmax(-1)
    if not bool(greedy.all()):
        heat = torch.where(greedy, 1.0, temperature).to(scores.dtype)[:, None]
        heated = torch.where(scores == -torch.inf, scores, scores / heat)  # -inf / inf is NaN
        probs = filter_probs(torch.softmax(heated, -1), top_k, top_p.to(scores.dtype), min_p.to(scores.dtype))
        mass = probs.cumsum(-1)
        bar = philox(seed, offset).to(mass.dtype)[:, None] * mass[:, -1:]
        sampled = (mass <= bar).sum(-1).clamp(max=logits.shape[-1] - 1)
        # By rounding, the cumulative sum can end on a filtered token: step back to the last kept one.
        kept = (
            torch.where(probs > 0, torch.arange(probs.shape[-1], dtype=torch.int64, device=probs.device), -1)
            .cummax(-1)
            .values
        )
        sampled = kept.gather(1, sampled[:, None])[:, 0]
        tokens = torch.where(greedy, tokens, sampled)
    legal = legal[:, 0]
    tokens = torch.where(legal, tokens, 0)
    logprobs = scores.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    return tokens, torch.where(legal, logprobs, torch.nan)
