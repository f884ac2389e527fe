"""FlashInfer's attention functions of one sequence, without a plan. They are public in `decode` and `prefill`."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastllama import kernels
from fastllama.errors import check_shape
from fastllama.integrations.arguments import refuse_arguments
from fastllama.integrations.flashinfer.checks import check_tensors
from fastllama.integrations.flashinfer.layouts import (
    Dtype,
    as_tokens,
    check_layout,
    dtype_of,
    page_scales,
    softmax_scale,
)
from fastllama.integrations.flashinfer.wrappers import refuse_positions


def single_decode_with_kv_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_tensor_cores: bool = False,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of one query, [Hq, D], over k and v: [T, Hkv, D] (NHD) or [Hkv, T, D] (HND), in q's dtype or 8 bits.

    Returns [Hq, D], and with return_lse the log-sum-exps to base 2, [Hq]. Keys are read in place, as pages of one
    token, so that the op can split a long sequence over the device.
    """
    name = "single_decode_with_kv_cache"
    refuse_positions(name, pos_encoding_mode, window_left, logits_soft_cap)
    check_layout(kv_layout)
    check_tensors(q=q)
    check_shape("q", q, ("Hq", "D"))
    k, v = as_tokens("k", k, kv_layout), as_tokens("v", v, kv_layout)
    check_shape("k", k, ("T", "Hkv", q.shape[1]))
    table = torch.arange(k.shape[0], dtype=torch.int32, device=q.device)[None]
    lengths = torch.full((1,), k.shape[0], dtype=torch.int32, device=q.device)
    key_scale, value_scale = page_scales(name, k_scale, v_scale, k)
    out, lse = kernels.attention_decode(
        q[None],
        k.unsqueeze(2),
        v.unsqueeze(2),
        table,
        lengths,
        k_scale=key_scale,
        v_scale=value_scale,
        scale=softmax_scale(name, sm_scale, q.shape[1], q_scale),
        return_lse=True,
        base2=True,
    )
    return (out[0], lse[0]) if return_lse else out[0]


def single_prefill_with_kv_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale_q: Tensor | None = None,
    scale_k: Tensor | None = None,
    scale_v: Tensor | None = None,
    o_dtype: Dtype = None,
    custom_mask: Tensor | None = None,
    packed_custom_mask: Tensor | None = None,
    causal: bool = False,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_fp16_qk_reduction: bool = False,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    kv_cache_sf: Any = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of one sequence's queries, [Tq, Hq, D], over k and v: [Tk, Hkv, D] (NHD) or [Hkv, Tk, D] (HND).

    causal: the last query sees all keys. One dtype for all. Returns [Tq, Hq, D], and with return_lse the log-sum-exps
    to base 2, [Tq, Hq]. 8-bit keys and v_scale are supported with paged caches only.
    """
    name = "single_prefill_with_kv_cache"
    refuse_positions(name, pos_encoding_mode, window_left, logits_soft_cap)
    check_tensors(q=q)
    refuse_arguments(
        name,
        scale_q=(scale_q, None),
        scale_k=(scale_k, None),
        scale_v=(scale_v, None),
        o_dtype=(o_dtype if o_dtype is None else dtype_of("o_dtype", o_dtype), None, q.dtype),
        custom_mask=(custom_mask, None),
        packed_custom_mask=(packed_custom_mask, None),
        kv_cache_sf=(kv_cache_sf, None),
        v_scale=(v_scale, None, 1),
    )
    check_layout(kv_layout)
    check_shape("q", q, ("Tq", "Hq", "D"))
    k, v = as_tokens("k", k, kv_layout), as_tokens("v", v, kv_layout)
    ends = torch.arange(2, dtype=torch.int32, device=q.device)
    scale = softmax_scale(name, sm_scale, q.shape[2], None, k_scale)
    bounds = (ends * q.shape[0], ends * k.shape[0])
    return kernels.attention_varlen(q, k, v, *bounds, scale=scale, causal=causal, return_lse=return_lse, base2=True)


single_prefill_with_kv_cache_return_lse = functools.partial(single_prefill_with_kv_cache, return_lse=True)
