"""flash-attn's functions for queries, keys and values in one tensor, passed as views to the other functions."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from torch import SymInt, Tensor

from fastllama.errors import brief, check_shape
from fastllama.integrations.flash_attn.attention import flash_attn_func, flash_attn_varlen_func
from fastllama.integrations.flash_attn.conventions import Result, Window, check_tensors


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    num_heads_q: int | None = None,
    **others: Any,
) -> Result:
    """`flash_attn_func` of qkv [B, S, 3, H, D]; others: its keyword arguments.

    With num_heads_q, qkv is [B, S, num_heads_q + 2 Hkv, D], as in FlashAttention 3: queries, then keys, then values.
    """
    check_tensors({"qkv": qkv})
    if num_heads_q is None or qkv.dim() == 5:
        check_shape("qkv", qkv, ("B", "S", 3, "H", "D"))
        q, k, v = qkv.unbind(2)
    else:
        check_shape("qkv", qkv, ("B", "S", "num_heads_q + 2 Hkv", "D"))
        if not isinstance(num_heads_q, (Integral, SymInt)):
            raise TypeError(f"num_heads_q is {brief(num_heads_q)}; legal: an int or None")
        num_kv_heads, odd = divmod(qkv.shape[2] - num_heads_q, 2)
        if odd or num_kv_heads < 1 or num_heads_q < 1:
            raise ValueError(
                f"num_heads_q is {num_heads_q}; legal: a number that leaves equally many heads of keys and values of "
                f"qkv's {qkv.shape[2]}"
            )
        q, k, v = qkv.split((num_heads_q, num_kv_heads, num_kv_heads), dim=2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        **others,
    )


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **others: Any,
) -> Result:
    """`flash_attn_func` of q [B, Sq, Hq, D] and kv [B, Sk, 2, Hkv, D]; others: its keyword arguments."""
    check_tensors({"kv": kv})
    check_shape("kv", kv, ("B", "Sk", 2, "Hkv", "D"))
    k, v = kv.unbind(2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        **others,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **others: Any,
) -> Result:
    """`flash_attn_varlen_func` of qkv [total, 3, H, D]; others: its keyword arguments."""
    check_tensors({"qkv": qkv})
    check_shape("qkv", qkv, ("total", 3, "H", "D"))
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        **others,
    )


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **others: Any,
) -> Result:
    """`flash_attn_varlen_func` of q [total_q, Hq, D] and kv [total_k, 2, Hkv, D]; others: its keyword arguments."""
    check_tensors({"kv": kv})
    check_shape("kv", kv, ("total_k", 2, "Hkv", "D"))
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        **others,
    )
