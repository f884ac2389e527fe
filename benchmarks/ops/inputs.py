"""Inputs of every op at the sizes of a Llama: random values, and outputs that are poisoned until they are written."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastllama import kernels
from fastllama.layers.config import LlamaConfig

Inputs = dict[str, Any]  # the arguments of a public op by name, its outputs among them
EPS = 1e-5
PAGE = 64
POSITIONS = 4096
DRAWN = 1 << 26  # numbers that are drawn at once: 256 MiB


@dataclass(frozen=True)
class Model:
    """The sizes of a Llama that shapes are made of."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @classmethod
    def of(cls, preset: str) -> Model:
        """The sizes of one of LlamaConfig's presets."""
        config = LlamaConfig.preset(preset)
        return cls(
            preset,
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.vocab_size,
        )


@dataclass(frozen=True)
class Maker:
    """Tensors for one case."""

    model: Model
    rows: int
    context: int
    codes: torch.dtype | None  # of quantized pages
    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator

    def normal(self, *shape: int) -> Tensor:
        """Drawn in fp32 and rounded, some rows at a time: all at once would take three times the memory in bf16."""
        made = torch.empty(shape, dtype=self.dtype, device=self.device)
        if made.numel():
            for rows in made.split(max(DRAWN * shape[0] // made.numel(), 1)):
                rows.copy_(torch.randn(rows.shape, generator=self.generator, device=self.device, dtype=torch.float32))
        return made

    def fresh(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        poison = math.nan if dtype.is_floating_point else torch.iinfo(dtype).max
        return torch.full(shape, poison, dtype=dtype, device=self.device)

    def below(self, high: int, count: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(high, (count,), generator=self.generator, device=self.device, dtype=dtype)

    def distinct(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self.generator, device=self.device)

    def filled(self, value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((self.rows,), value, dtype=dtype, device=self.device)

    def turns(self) -> Inputs:
        frequencies = 10000.0 ** -(torch.arange(0, self.model.head_dim, 2, device=self.device) / self.model.head_dim)
        return {
            "cos_sin": kernels.cos_sin_cache(frequencies, POSITIONS),
            "positions": self.below(POSITIONS, self.rows),
        }

    def pages(self, count: int) -> Inputs:
        """Pages of random keys and values, or of random codes with their scales."""
        shape = (count, self.model.kv_heads, PAGE, self.model.head_dim)
        if self.codes is None:
            return {"k_pages": self.normal(*shape), "v_pages": self.normal(*shape)}
        drawn = {"generator": self.generator, "device": self.device}
        pages = {f"{name}_pages": torch.randint(-127, 128, shape, dtype=self.codes, **drawn) for name in "kv"}
        return pages | {f"{name}_scales": torch.rand(shape[:3], **drawn) / 64 for name in "kv"}


def rms_norm(m: Maker) -> Inputs:
    size = m.model.hidden
    return {"x": m.normal(m.rows, size), "weight": m.normal(size), "eps": EPS, "out": m.fresh(m.rows, size)}


def add_rms_norm(m: Maker) -> Inputs:
    shape = (m.rows, m.model.hidden)
    return rms_norm(m) | {"residual": m.normal(*shape), "residual_out": m.fresh(*shape)}


def rope(m: Maker) -> Inputs:
    shapes = {"q": (m.rows, m.model.heads, m.model.head_dim), "k": (m.rows, m.model.kv_heads, m.model.head_dim)}
    inputs = {name: m.normal(*shape) for name, shape in shapes.items()}
    return inputs | m.turns() | {f"{name}_out": m.fresh(*shape) for name, shape in shapes.items()}


def rope_and_write_kv(m: Maker) -> Inputs:
    model, count = m.model, max(-(-m.rows // PAGE), 1)
    return {
        "qkv": m.normal(m.rows, (model.heads + 2 * model.kv_heads) * model.head_dim),
        **m.turns(),
        "slots": m.distinct(count * PAGE)[: m.rows],
        **m.pages(count),
        "q_out": m.fresh(m.rows, model.heads, model.head_dim),
    }


def silu_mul(m: Maker) -> Inputs:
    size = m.model.intermediate
    return {"gate_up": m.normal(m.rows, 2 * size), "out": m.fresh(m.rows, size)}


def merge_state(m: Maker) -> Inputs:
    """Log-sum-exps near each other: neither side's share is 0."""
    sides = (m.rows, m.model.heads, m.model.head_dim)
    inputs = {name: m.normal(*sides) for name in "ab"}
    inputs |= {f"{name}_lse": m.normal(*sides[:2]).float() for name in "ab"}
    return inputs | {"out": m.fresh(*sides), "lse_out": m.fresh(*sides[:2], dtype=torch.float32)}


def sample(m: Maker) -> Inputs:
    """Top-k and top-p in every row; no min-p, which FlashInfer does not combine with them."""
    logits = 2 * m.normal(m.rows, m.model.vocab)
    return {
        "logits": logits,
        "temperature": m.filled(0.75),
        "top_k": m.filled(50, torch.int32),
        "top_p": m.filled(0.875),
        "min_p": m.filled(0.0),
        "seed": m.below(1 << 62, m.rows),
        "offset": m.below(1 << 31, m.rows),
        "tokens": m.fresh(m.rows, dtype=torch.int64),
        "logprobs": m.fresh(m.rows, dtype=torch.float32),
        **_workspace(kernels.sample_workspace(logits)),
    }


def embedding(m: Maker) -> Inputs:
    vocab, size = m.model.vocab, m.model.hidden
    return {"ids": m.below(vocab, m.rows), "weight": m.normal(vocab, size), "out": m.fresh(m.rows, size)}


def matmul(m: Maker) -> Inputs:
    """The gate and up projection, the largest of a layer."""
    size, features = m.model.hidden, 2 * m.model.intermediate
    weight = m.normal(features, size) / math.sqrt(size)
    inputs: Inputs = {"x": m.normal(m.rows, size), "weight": weight, "out": m.fresh(m.rows, features)}
    return inputs | _workspace(kernels.matmul_workspace(m.rows, weight))


def matmul_int4(m: Maker) -> Inputs:
    """The gate and up projection in symmetric codes, groups of 128 as they are usual, of all columns in a toy."""
    packed = kernels.pack_int4(_codes(m, 0, 16, torch.uint8))
    return _by_codes(m, packed, 1 / 8, kernels.matmul_int4_workspace)


def matmul_int8(m: Maker) -> Inputs:
    """As of 4 bits."""
    packed = kernels.pack_int8(_codes(m, -128, 128, torch.int8))
    return _by_codes(m, packed, 1 / 128, kernels.matmul_int8_workspace)


def quantize_rows(m: Maker) -> Inputs:
    return {"x": m.normal(m.rows, m.model.hidden), **_rounded(m, m.model.hidden)}


def rms_norm_int8(m: Maker) -> Inputs:
    return quantize_rows(m) | {"weight": m.normal(m.model.hidden)}


def add_rms_norm_int8(m: Maker) -> Inputs:
    return rms_norm_int8(m) | {"residual": m.normal(m.rows, m.model.hidden)}


def silu_mul_int8(m: Maker) -> Inputs:
    size = m.model.intermediate
    return {"gate_up": m.normal(m.rows, 2 * size), **_rounded(m, size)}


def _rounded(m: Maker, size: int) -> Inputs:
    return {"out": m.fresh(m.rows, size, dtype=torch.int8), "scales_out": m.fresh(m.rows, dtype=torch.float32)}


def matmul_w8a8(m: Maker) -> Inputs:
    """The gate and up projection."""
    size, features = m.model.hidden, 2 * m.model.intermediate
    x, x_scales = kernels.quantize_rows(m.normal(m.rows, size))
    packed = kernels.pack_int8(_codes(m, -128, 128, torch.int8))
    scales = m.normal(features) / (128 * math.sqrt(size))
    workspace = kernels.matmul_w8a8_workspace(x, packed, scales)
    return {
        "x": x,
        "x_scales": x_scales,
        "packed": packed,
        "scales": scales,
        "out": m.fresh(m.rows, features),
        "workspace": workspace if workspace.numel() else None,
    }


def _codes(m: Maker, first: int, end: int, dtype: torch.dtype) -> Tensor:
    shape = 2 * m.model.intermediate, m.model.hidden
    return torch.randint(first, end, shape, dtype=dtype, generator=m.generator, device=m.device)


def _by_codes(m: Maker, packed: Tensor, scale: float, scratch: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Inputs:
    size, features = m.model.hidden, 2 * m.model.intermediate
    x, scales = m.normal(m.rows, size), m.normal(features, max(size // 128, 1)) * scale / math.sqrt(size)
    workspace = scratch(x, packed, scales)
    return {
        "x": x,
        "packed": packed,
        "scales": scales,
        "out": m.fresh(m.rows, features),
        "workspace": workspace if workspace.numel() else None,
    }


def attention_varlen(m: Maker) -> Inputs:
    heads = {"q": m.model.heads, "k": m.model.kv_heads, "v": m.model.kv_heads}
    bounds = torch.tensor([0, m.rows], dtype=torch.int32, device=m.device)
    inputs: Inputs = {name: m.normal(m.rows, count, m.model.head_dim) for name, count in heads.items()}
    out = m.fresh(m.rows, m.model.heads, m.model.head_dim)
    return inputs | {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "out": out}


def attention_decode(m: Maker) -> Inputs:
    count = -(-m.context // PAGE)
    shape = (m.rows, m.model.heads, m.model.head_dim)
    inputs: Inputs = {
        "q": m.normal(*shape),
        **m.pages(m.rows * count),
        "page_table": m.distinct(m.rows * count).int().view(m.rows, count),
        "seq_lens": m.filled(m.context, torch.int32),
        "out": m.fresh(*shape),
    }
    return inputs | _workspace(kernels.attention_workspace(inputs["q"], inputs["k_pages"], inputs["page_table"]))


def _workspace(made: Tensor) -> Inputs:
    """None where there is no need: a public function that is given one must take it."""
    return {"workspace": made if made.numel() else None}


def attention_prefill(m: Maker) -> Inputs:
    """A prompt with nothing before it: the same work as attention_varlen, out of pages."""
    count = -(-m.rows // PAGE)
    shape = (m.rows, m.model.heads, m.model.head_dim)
    return {
        "q": m.normal(*shape),
        **m.pages(count),
        "page_table": m.distinct(count).int().view(1, count),
        "seq_lens": torch.tensor([m.rows], dtype=torch.int32, device=m.device),
        "cu_seqlens_q": torch.tensor([0, m.rows], dtype=torch.int32, device=m.device),
        "out": m.fresh(*shape),
    }
