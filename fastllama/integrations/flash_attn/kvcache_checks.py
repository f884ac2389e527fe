"""Argument checks of flash_attn_with_kvcache, all before new keys and values are appended."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from fastllama.errors import brief, check_device, check_dtype, check_shape
from fastllama.integrations.flash_attn.cache import token_pitch
from fastllama.integrations.flash_attn.conventions import check_integers, check_pages
from fastllama.kernels.dispatch.checks import FLOATS, check_tensor

_MOST = 2**31 - 1  # tokens: lengths are int32


def check_queries(q: Tensor, cu_seqlens_q: Tensor | None, out: Tensor | None) -> int:
    """Check queries; returns the number of sequences."""
    check_dtype("q", q, FLOATS)
    if out is not None:
        check_tensor("out", out, q.shape, (q.dtype,))
        check_device("out", out, "q", q)
    if cu_seqlens_q is None:
        check_shape("q", q, ("B", "Sq", "Hq", "D"))
        return q.shape[0]
    check_shape("q", q, ("total_q", "Hq", "D"))
    return _check_bounds("cu_seqlens_q", cu_seqlens_q, q)


def check_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_seqs: int,
    cache_seqlens: int | Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    table: Tensor | None,
) -> None:
    """Check cached keys and values, and the rows or pages of each sequence."""
    check_shape("k_cache", k_cache, ("Bc", "S", "Hkv", "D") if table is None else ("P", "page_size", "Hkv", "D"))
    check_pages(q, "k_cache", k_cache, "v_cache", v_cache)
    for name, each in (("cache_batch_idx", cache_batch_idx), ("cache_leftpad", cache_leftpad)):
        check_integers(name, each, (num_seqs,), q)
    if isinstance(cache_seqlens, Tensor):
        check_integers("cache_seqlens", cache_seqlens, (num_seqs,), q)
    elif cache_seqlens is not None:
        if not isinstance(cache_seqlens, (Integral, torch.SymInt)):
            raise TypeError(f"cache_seqlens is {brief(cache_seqlens)}; legal: an int, a tensor [B] or None")
        if not 0 <= cache_seqlens <= _MOST:
            raise ValueError(f"cache_seqlens is {brief(cache_seqlens)}; legal: 0 to {_MOST}")
    if table is not None:
        check_integers("block_table", table, (num_seqs, "pages"), q)
        if cache_batch_idx is not None:
            raise ValueError("cache_batch_idx is a tensor; legal with block_table: None")
    elif cache_batch_idx is None and k_cache.shape[0] < num_seqs:
        raise ValueError(
            f"k_cache has {k_cache.shape[0]} rows for {num_seqs} sequences; legal: a row for each, or cache_batch_idx"
        )
    if cache_leftpad is not None and not 0 < token_pitch(k_cache) == token_pitch(v_cache):
        raise ValueError(
            f"k_cache has strides {list(k_cache.stride())}, v_cache {list(v_cache.stride())}; legal with "
            "cache_leftpad: the first a multiple of the second, and the same one in both"
        )


def check_new(
    q: Tensor,
    k_cache: Tensor,
    num_seqs: int,
    k: Tensor | None,
    v: Tensor | None,
    cache_seqlens: int | Tensor | None,
    cu_seqlens_k_new: Tensor | None,
) -> None:
    """Check keys and values to append."""
    if k is None or v is None:
        if k is not None or v is not None:
            raise ValueError(
                f"{'k' if v is None else 'v'} is a tensor, {'v' if v is None else 'k'} is None; legal: both"
            )
        return
    if cache_seqlens is None:
        raise ValueError("cache_seqlens is None; legal where k and v are given: an int or a tensor [B]")
    heads = k_cache.shape[2:]
    if cu_seqlens_k_new is None:
        check_shape("k", k, (num_seqs, "Sn", *heads))
    else:
        check_shape("k", k, ("total_new", *heads))
        if _check_bounds("cu_seqlens_k_new", cu_seqlens_k_new, q) != num_seqs:
            check_shape("cu_seqlens_k_new", cu_seqlens_k_new, (num_seqs + 1,))
    check_shape("v", v, k.shape)
    for name, each in (("k", k), ("v", v)):
        if each.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {each.dtype}; legal: q's, {q.dtype}")
        check_device(name, each, "q", q)


def check_rotary(
    q: Tensor,
    num_seqs: int,
    k: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_seqlens: Tensor | None,
) -> None:
    """Check the rotary angles and their start positions."""
    check_integers("rotary_seqlens", rotary_seqlens, (num_seqs,), q)
    if rotary_cos is None or rotary_sin is None:
        if rotary_cos is not None or rotary_sin is not None:
            given, other = ("rotary_cos", "rotary_sin") if rotary_sin is None else ("rotary_sin", "rotary_cos")
            raise ValueError(f"{given} is a tensor, {other} is None; legal: both")
        return
    if k is None:
        raise ValueError("rotary_cos is a tensor; legal where k and v are None: None")
    head_dim = q.shape[-1]
    check_shape("rotary_cos", rotary_cos, ("max", "R / 2"))
    if 2 * rotary_cos.shape[1] > head_dim:
        raise ValueError(f"rotary_cos has shape {list(rotary_cos.shape)}; legal: [max, R / 2] with R up to {head_dim}")
    legal = (q.dtype, torch.float32)
    for name, each in (("rotary_cos", rotary_cos), ("rotary_sin", rotary_sin)):
        check_shape(name, each, rotary_cos.shape)
        if each.dtype not in legal or each.dtype != rotary_cos.dtype:
            raise TypeError(f"{name} has dtype {each.dtype}; legal: {q.dtype} or {torch.float32}, the same for both")
        check_device(name, each, "q", q)


def _check_bounds(name: str, bounds: Tensor, q: Tensor) -> int:
    """Check row bounds; returns the number of sequences."""
    check_integers(name, bounds, ("B + 1",), q)
    if bounds.shape[0] < 2:
        raise ValueError(f"{name} has shape {list(bounds.shape)}; legal: [B + 1], of one sequence or more")
    return bounds.shape[0] - 1
