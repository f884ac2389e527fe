"""The ops in plain torch, written as in Hugging Face's models, for `torch eager` and `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllama.catalogue.maker import EPS, Arguments

Function = Callable[[Arguments], Any]


def _rms_norm(t: Arguments) -> Tensor:
    """As Hugging Face's LlamaRMSNorm computes it."""
    x = t["x"].float()
    return t["weight"] * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)).to(t["x"].dtype)


def _add_rms_norm(t: Arguments) -> tuple[Tensor, Tensor]:
    total = t["x"] + t["residual"]
    return _rms_norm({"x": total, "weight": t["weight"]}), total


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, D] rotated by angles [T, 1, D / 2] in fp32."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def _rope(t: Arguments) -> tuple[Tensor, Tensor]:
    cos, sin = t["cos_sin"][t["positions"]][:, None].chunk(2, dim=-1)
    return _turn(t["q"], cos, sin), _turn(t["k"], cos, sin)


def _rope_and_write_kv(t: Arguments) -> Tensor:
    _, kv_heads, _, dim = t["k_pages"].shape
    heads = t["qkv"].unflatten(-1, (-1, dim))
    q, k, v = heads.split((heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
    q, k = _rope({"q": q, "k": k, "cos_sin": t["cos_sin"], "positions": t["positions"]})
    _write_kv({**t, "k": k, "v": v})
    return q


def _write_kv(t: Arguments) -> None:
    page = t["k_pages"].shape[2]
    at, slot = t["slots"] // page, t["slots"] % page
    t["k_pages"][at, :, slot] = t["k"]
    t["v_pages"][at, :, slot] = t["v"]


def _silu_mul(t: Arguments) -> Tensor:
    gate, up = t["gate_up"].chunk(2, dim=-1) if t.get("up") is None else (t["gate_up"], t["up"])
    return F.silu(gate) * up


def _merge_state(t: Arguments) -> tuple[Tensor, Tensor]:
    a_share, b_share = torch.stack((t["a_lse"], t["b_lse"])).softmax(0).to(t["a"].dtype)[..., None]
    return t["a"] * a_share + t["b"] * b_share, torch.logaddexp(t["a_lse"], t["b_lse"])


def _sample(t: Arguments) -> tuple[Tensor, Tensor]:
    """One sort for top-k, top-p and min-p, then the first token whose cumulative mass passes a random number."""
    logits = t["logits"].float()
    probs, order = (logits / t["temperature"][:, None]).softmax(-1).sort(dim=-1, descending=True)
    ranks = torch.arange(probs.shape[1], dtype=torch.int64, device=probs.device)
    probs = probs.masked_fill(ranks >= t["top_k"][:, None], 0.0)
    mass = probs.cumsum(-1)
    probs = probs.masked_fill(mass - probs >= t["top_p"][:, None] * mass[:, -1:], 0.0)
    probs = probs.masked_fill(probs < probs[:, :1] * t["min_p"][:, None], 0.0)
    mass = probs.cumsum(-1)
    place = (mass <= torch.rand_like(mass[:, :1]) * mass[:, -1:]).sum(-1, keepdim=True)
    tokens = order.gather(1, place)[:, 0]
    return tokens, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def _adjust_logits(t: Arguments) -> Tensor:
    """Dense over the vocabulary, for rows that all have a table and equally many recent tokens."""
    x, counts = t["logits"] + t["bias"][t["slots"]], t["counts"][t["slots"]]
    recent = t["tokens"].view(x.shape[0], -1)
    counts = counts.scatter_add(1, recent, torch.full_like(recent, 2, dtype=counts.dtype))
    generated = counts >> 1
    repetition, presence, frequency = (
        t[f"{name}_penalty"][:, None] for name in ("repetition", "presence", "frequency")
    )
    x = torch.where(counts != 0, torch.where(x > 0, x / repetition, x * repetition), x)
    return x - presence * (generated > 0) - frequency * generated


EAGER: dict[str, Function] = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "rope": _rope,
    "rope_and_write_kv": _rope_and_write_kv,
    "write_kv": _write_kv,
    "silu_mul": _silu_mul,
    "merge_state": _merge_state,
    "sample": _sample,
    "adjust_logits": _adjust_logits,
}
