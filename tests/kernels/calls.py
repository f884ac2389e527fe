"""One legal call of every public op, with all its outputs given."""

from __future__ import annotations

from typing import Any

import torch

from fastllama.kernels import cos_sin_cache
from fastllama.kernels.dispatch.op import OPS
from fastllama.kernels.reference import pack_bf12, pack_int4, pack_int8

# tokens, query heads, key heads, head dimension, pages, page size: unlike, lest torch.compile takes one for another
T, HQ, HKV, D, P, PAGE = 3, 6, 2, 8, 5, 7


WEIGHT = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
WEIGHT[2, 7], WEIGHT[5, 63] = 2.0**40, 2.0**-40  # outliers
CODES, OUTLIERS, EXPONENT = pack_bf12(WEIGHT)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def positional(op: str, given: dict[str, Any]) -> tuple[Any, ...]:
    """Arguments by name as the op itself takes them; None where there is no such name."""
    return tuple(given.get(name) for name in OPS[op].names)


def around(rows: int, size: int) -> dict[str, Any]:
    """What a product to 6 features takes of the ops before and behind it."""
    return {"norm": torch.rand(size), "eps": 1e-5, "residual": torch.randn(rows, 6), "gated": False}


def arguments(op: str) -> dict[str, Any]:
    """Every tensor of the op's schema by name but an optional log-sum-exp, and its scalars."""
    hidden, weight = torch.randn(T, D), torch.randn(D)
    q, k = torch.randn(T, HQ, D), torch.randn(T, HKV, D)
    pages = {"k_pages": torch.randn(P, HKV, PAGE, D), "v_pages": torch.randn(P, HKV, PAGE, D)}
    unscaled = {"k_scales": None, "v_scales": None}
    turns = {"cos_sin": cos_sin_cache(torch.rand(D // 2), 16), "positions": torch.arange(T)}
    # the last sequence is padding
    table = {"page_table": int32(4, 0, 2, 1, 3, 3).view(3, 2), "seq_lens": int32(6, 3, 0)}
    return {
        "rms_norm": {"x": hidden, "weight": weight, "eps": 1e-5, "out": torch.empty(T, D)},
        "add_rms_norm": {
            "x": hidden,
            "residual": torch.randn(T, D),
            "weight": weight,
            "eps": 1e-5,
            "out": torch.empty(T, D),
            "residual_out": torch.empty(T, D),
        },
        "rms_norm_int8": {
            "x": hidden,
            "weight": weight,
            "eps": 1e-5,
            "out": torch.empty(T, D, dtype=torch.int8),
            "scales_out": torch.empty(T),
        },
        "add_rms_norm_int8": {
            "x": hidden,
            "residual": torch.randn(T, D),
            "weight": weight,
            "eps": 1e-5,
            "out": torch.empty(T, D, dtype=torch.int8),
            "scales_out": torch.empty(T),
        },
        "silu_mul_int8": {
            "gate_up": torch.randn(T, 2 * D),
            "out": torch.empty(T, D, dtype=torch.int8),
            "scales_out": torch.empty(T),
        },
        "rope": {
            "q": q,
            "k": k,
            **turns,
            "interleaved": False,
            "q_out": torch.empty_like(q),
            "k_out": torch.empty_like(k),
        },
        "rope_and_write_kv": {
            "qkv": torch.randn(T, (HQ + 2 * HKV) * D),
            **turns,
            "slots": torch.tensor([0, -1, 7]),
            **pages,
            **unscaled,
            "interleaved": False,
            "q_out": torch.empty_like(q),
        },
        "attention_varlen": {
            "q": q,
            "k": k,
            "v": torch.randn(T, HKV, D),
            "cu_seqlens_q": int32(0, 1, 3, 3),
            "cu_seqlens_k": int32(0, 1, 3, 3),
            "scale": 0.3,
            "causal": True,
            "base2": False,
            "out": torch.empty_like(q),
        },
        "attention_prefill": {
            "q": q,
            **pages,
            **table,
            "cu_seqlens_q": int32(0, 2, 3, 3),
            **unscaled,
            "scale": 0.3,
            "base2": False,
            "out": torch.empty_like(q),
        },
        "attention_decode": {
            "q": q,
            **pages,
            **table,
            **unscaled,
            "scale": 0.3,
            "base2": False,
            "out": torch.empty_like(q),
            "workspace": None,
        },
        "matmul": {
            "x": hidden,
            "weight": torch.randn(6, D),
            "bias": torch.randn(6),
            **around(T, D),
            "out": torch.empty(T, 6),
            "workspace": None,
        },
        "matmul_bf12": {
            "x": torch.randn(4, 64),  # T rows could be taken for the 3 numbers of an outlier
            "codes": CODES,
            "outliers": OUTLIERS,
            "exponent": EXPONENT,
            "bias": torch.randn(6),
            **around(4, 64),
            "out": torch.empty(4, 6),
        },
        "matmul_int4": {
            "x": torch.randn(T, 160),
            "packed": pack_int4(torch.randint(16, (6, 160), dtype=torch.uint8)),
            "scales": torch.randn(6, 5),
            "zeros": 15 * torch.rand(6, 5),
            "bias": torch.randn(6),
            **around(T, 160),
            "out": torch.empty(T, 6),
            "workspace": None,
        },
        "matmul_int8": {
            "x": torch.randn(T, 160),
            "packed": pack_int8(torch.randint(-128, 128, (6, 160), dtype=torch.int8)),
            "scales": torch.randn(6, 5),
            "bias": torch.randn(6),
            **around(T, 160),
            "out": torch.empty(T, 6),
            "workspace": None,
        },
        "quantize_rows": {
            "x": hidden,
            "out": torch.empty(T, D, dtype=torch.int8),
            "scales_out": torch.empty(T),
        },
        "matmul_w8a8": {
            "x": torch.randint(-127, 128, (T, 128), dtype=torch.int8),
            "x_scales": torch.rand(T),
            "packed": pack_int8(torch.randint(-128, 128, (6, 128), dtype=torch.int8)),
            "scales": torch.randn(6),
            "bias": torch.randn(6),
            "out": torch.empty(T, 6),
            "workspace": None,
        },
        "embedding": {"ids": torch.tensor([3, 0, 5]), "weight": torch.randn(6, D), "out": torch.empty(T, D)},
        "silu_mul": {"gate_up": torch.randn(T, 2 * D), "out": torch.empty(T, D)},
        "merge_state": {
            "a": q,
            "a_lse": torch.randn(T, HQ),
            "b": torch.randn(T, HQ, D),
            "b_lse": torch.randn(T, HQ),
            "out": torch.empty_like(q),
            "lse_out": torch.empty(T, HQ),
        },
        "sample": {
            "logits": torch.randn(T, 9),
            "temperature": torch.tensor([0.0, 1.0, 0.5]),
            "top_k": int32(0, 5, 2),
            "top_p": torch.tensor([1.0, 0.9, 1.0]),
            "min_p": torch.tensor([0.0, 0.0, 0.1]),
            "seed": torch.arange(T),
            "offset": torch.arange(T),
            "tokens": torch.empty(T, dtype=torch.int64),
            "logprobs": torch.empty(T),
            "workspace": None,
        },
    }[op]
