"""A reference Llama in explicit formulas of plain torch: dense, unpaged, independent of the implementation under test.

Every function computes in the dtype of its tensors. In fp64 it is the oracle. In the model's own dtype it is plain
torch with the same formulas (norms, rotation and softmax in at least fp32, each result rounded once), which calibrates
the error bounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllama.layers.config import LlamaConfig, RopeScaling


def wide(x: Tensor) -> Tensor:
    """x itself if it is fp64, else in fp32."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, rounded before the weight, as Hugging Face does."""
    h = wide(x)
    return weight * (h / (h.pow(2).mean(-1, keepdim=True) + eps).sqrt()).to(x.dtype)


def silu_mul(gate_up: Tensor, up: Tensor | None = None) -> Tensor:
    """gate * sigmoid(gate) * up of [gate | up] along the last dimension, or of two tensors."""
    gate, up = gate_up.tensor_split(2, dim=-1) if up is None else (gate_up, up)
    return F.silu(gate) * up


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Turn pairs of x [T, heads, D] as complex numbers: (a + bi)(cos + i sin), angles [T, R/2].

    Pairs are (x_i, x_{i+R/2}), or neighbours (x_2i, x_2i+1) if interleaved; dimensions from R on stay.
    """
    half = cos.shape[-1]
    first, second = slice(half), slice(half, 2 * half)
    if interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    a, b = wide(x[..., first]), wide(x[..., second])
    cos, sin = cos[:, None], sin[:, None]
    turned = x.clone()
    turned[..., first] = (a * cos - b * sin).to(x.dtype)
    turned[..., second] = (a * sin + b * cos).to(x.dtype)
    return turned


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = True) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k^T) v of one sequence, and the log-sum-exp of the scores.

    q: [Lq, Hq, D], k, v: [Lk, Hkv, D] -> [Lq, Hq, D], [Lq, Hq]. Causal: query i sees the keys up to i + Lk - Lq; one
    without keys gives 0 and -inf. The softmax is rounded to v's dtype before the matmul with v, as on tensor cores.
    """
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))  # [Hq, Lk, D]
    scores = scale * (wide(q).transpose(0, 1) @ wide(k).transpose(1, 2))  # [Hq, Lq, Lk]
    if causal:
        len_q, len_k = scores.shape[1:]
        queries, keys = (torch.arange(count, dtype=torch.int64, device=q.device) for count in (len_q, len_k))
        seen = keys <= queries[:, None] + len_k - len_q
        scores = scores.masked_fill(~seen, -math.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().nan_to_num(0.0)  # NaN: -inf - -inf, a query without keys
    return (weights.to(v.dtype) @ v).transpose(0, 1), lse.transpose(0, 1)


def angles(config: LlamaConfig, positions: Tensor, max_model_len: int, *, next_frequencies: bool = False) -> Tensor:
    """[T, head_dim / 2] radians in fp64, position times frequency.

    Frequencies and angles are fp32 by definition, as computed by Meta and Hugging Face: models are trained with these
    angles, and more exact ones differ (by 6e-5 at position 1000). next_frequencies: each larger by an fp32 ulp, as
    another order of the same operations may round it.
    Sources: RoFormer (Su et al., 2021); linear: Chen et al., 2023; dynamic NTK: bloc97, 2023; llama3: its model card;
    YaRN: Peng et al., 2023.
    """
    theta, scaling, dim = config.rope_theta, config.rope_scaling, config.head_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
    if scaling is not None and scaling.kind == "dynamic":
        grown = max(max_model_len / config.max_position_embeddings, 1.0)
        theta = theta * (1 + scaling.factor * (grown - 1)) ** (dim / (dim - 2))
    frequencies = 1.0 / theta**exponents
    if scaling is not None and scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    if scaling is not None and scaling.kind == "llama3":
        assert scaling.original_max_position_embeddings is not None
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        turns = frequencies * scaling.original_max_position_embeddings / math.tau
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = kept * frequencies + (1 - kept) * frequencies / scaling.factor
    if scaling is not None and scaling.kind == "yarn":
        frequencies = frequencies.lerp(frequencies / scaling.factor, stretched(scaling, theta, dim).to(frequencies))
    if next_frequencies:
        frequencies = frequencies.nextafter(torch.full_like(frequencies, math.inf))
    return torch.outer(positions.float(), frequencies).double()


def stretched(scaling: RopeScaling, theta: float, dim: int) -> Tensor:
    """YaRN's ramp [dim / 2]: the share of each frequency that is divided by the factor, as its authors implement it.

    Frequency i turns L theta^(-2i/dim) / tau times in the trained length L, so it is beta times at
    i = dim log(L / (tau beta)) / (2 log theta).
    """
    length = scaling.original_max_position_embeddings
    assert length is not None
    ends = [dim * math.log(length / (math.tau * beta), theta) / 2 for beta in (scaling.beta_fast, scaling.beta_slow)]
    if scaling.truncate:
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    first, last = max(ends[0], 0), min(ends[1], dim - 1)
    steps = torch.arange(dim // 2, dtype=torch.float64, device="cpu") - first
    return (steps / (last - first if last != first else 1e-3)).clamp(0, 1)


def magnitude(config: LlamaConfig) -> float:
    """The scale of cosines and sines: 1; for YaRN 0.1 ln(factor) + 1 unless the checkpoint specifies it."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 1 + math.log(max(scaling.factor, 1)) / 10


def forward(
    config: LlamaConfig,
    weights: Mapping[str, Tensor],
    ids: Tensor,
    dtype: torch.dtype,
    max_model_len: int,
    *,
    next_frequencies: bool = False,
) -> Iterator[Tensor]:
    """The residual stream [T, hidden_size] after each layer, then the logits [T, vocab_size], of one sequence ids [T].

    weights: by Hugging Face name. They are cast to `dtype` one matrix at a time and freed again, so that extra memory
    is bounded by the largest of them. next_frequencies: as for `angles`.
    """

    def weight(name: str) -> Tensor:
        return weights[name].to(dtype)

    def linear(x: Tensor, name: str) -> Tensor:
        bias = f"{name}.bias"
        return F.linear(x, weight(f"{name}.weight"), weight(bias) if bias in weights else None)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, config.head_dim))

    positions = torch.arange(ids.shape[0], dtype=torch.int64, device=ids.device)
    turns = angles(config, positions, max_model_len, next_frequencies=next_frequencies)
    length = magnitude(config)
    cos, sin = (length * x.to(torch.promote_types(dtype, torch.float32)) for x in (turns.cos(), turns.sin()))
    x = weights["model.embed_tokens.weight"][ids].to(dtype)
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        h = rms_norm(x, weight(f"{layer}.input_layernorm.weight"), config.rms_norm_eps)
        q, k, v = (heads(linear(h, f"{layer}.self_attn.{kind}_proj")) for kind in "qkv")
        out, _ = attention(rotate(q, cos, sin), rotate(k, cos, sin), v, 1 / math.sqrt(config.head_dim))
        x = x + linear(out.flatten(1), f"{layer}.self_attn.o_proj")
        h = rms_norm(x, weight(f"{layer}.post_attention_layernorm.weight"), config.rms_norm_eps)
        gate_up = torch.cat([linear(h, f"{layer}.mlp.{kind}_proj") for kind in ("gate", "up")], dim=-1)
        x = x + linear(silu_mul(gate_up), f"{layer}.mlp.down_proj")
        yield x
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    yield F.linear(rms_norm(x, weight("model.norm.weight"), config.rms_norm_eps), weight(head))
