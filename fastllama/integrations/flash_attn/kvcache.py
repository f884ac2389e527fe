"""flash_attn_with_kvcache: rotates and appends new keys and values, then attends to the cache, contiguous or paged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastllama.integrations.flash_attn.cache import Cache, Tokens
from fastllama.integrations.flash_attn.conventions import (
    Result,
    Window,
    any_flag,
    as_rows,
    check_inputs,
    delivered,
    even_bounds,
    flag,
    lse_rows,
    one_of,
    refuse,
    result_rows,
    scale_of,
    with_their_names,
)
from fastllama.integrations.flash_attn.kvcache_checks import check_cache, check_new, check_queries, check_rotary
from fastllama.integrations.flash_attn.rotary import rotate
from fastllama.kernels.dispatch.op import OPS


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float | None = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: Any = None,
    rotary_seqlens: Tensor | None = None,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    attention_chunk: int | None = 0,
    learnable_sink: Tensor | None = None,
    s_aux: Tensor | None = None,
    scheduler_metadata: Tensor | None = None,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    fa_version: int | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Result:
    """Attention of new queries over a cache of keys and values, to which new ones may be appended first.

    q: [B, Sq, Hq, D], or [total_q, Hq, D] with cu_seqlens_q [B + 1]. k_cache, v_cache: [Bc, S, Hkv, D], row b (or
    cache_batch_idx[b]) of sequence b; or pages [P, page_size, Hkv, D] of any page size with block_table (page_table)
    [B, pages]. Any strides but the last. cache_seqlens: an int or [B], tokens in the cache; None: all. All
    integer tensors int32 or int64.
    k, v: [B, Sn, Hkv, D], or [total_new, Hkv, D] with cu_seqlens_k_new [B + 1]: written at cache_seqlens, in place,
    before attention; a token beyond its row or pages is not written.
    rotary_cos, rotary_sin: [max, R / 2] in q's dtype or fp32, for k and q: k's token i at position
    cache_seqlens + i (rotary_seqlens + i), and so q's token i if causal; otherwise all of q at cache_seqlens. Positions
    count all cached tokens, hidden ones too. rotary_interleaved: pairs (x_2i, x_2i+1), else (x_i, x_{i+R/2}).
    cache_leftpad: [B], number of hidden tokens at the beginning of each sequence.
    causal: bottom-right aligned, the last query sees all keys. out: like q; allocated when None.
    Returns out, or with return_softmax_lse or return_lse (out, lse [B, Hq, Sq], or [Hq, total_q], fp32), natural. A row
    without keys gives 0 and the log-sum-exp +inf. A sequence longer than its row or pages gives NaN, and so does a
    negative length in a tensor, whose new tokens are not written.
    Hints have no effect: num_splits, max_seqlen_q, scheduler_metadata, pack_gqa, sm_margin, fa_version.
    Raises NotImplementedError for an unsupported argument, RuntimeError for tensors that require grad under grad mode,
    ValueError for a shape, stride or device, TypeError for a dtype; nothing is written then, nor appended.
    Source: flash-attn 2.8.3, `flash_attn_interface.py` and `csrc`; keyword arguments also of FlashAttention 3.
    """
    name = "flash_attn_with_kvcache"
    causal, rotary_interleaved = flag("causal", causal), flag("rotary_interleaved", rotary_interleaved)
    refuse(
        name,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        attention_chunk=attention_chunk,
        alibi_slopes=alibi_slopes,
        qv=qv,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        learnable_sink=learnable_sink,
        s_aux=s_aux,
    )
    check_inputs(
        name,
        {"q": q, "k_cache": k_cache, "v_cache": v_cache},
        k=k,
        v=v,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        block_table=block_table,
        page_table=page_table,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k_new=cu_seqlens_k_new,
        rotary_seqlens=rotary_seqlens,
        out=out,
    )
    with_lse = any_flag(return_softmax_lse=return_softmax_lse, return_lse=return_lse)
    table = one_of("block_table", block_table, "page_table", page_table)
    num_seqs = check_queries(q, cu_seqlens_q, out)
    check_cache(q, k_cache, v_cache, num_seqs, cache_seqlens, cache_batch_idx, cache_leftpad, table)
    check_new(q, k_cache, num_seqs, k, v, cache_seqlens, cu_seqlens_k_new)
    check_rotary(q, num_seqs, k, rotary_cos, rotary_sin, rotary_seqlens)
    is_ours, scale, rows = out is None, scale_of(softmax_scale, q), as_rows(q)
    out, to = result_rows(out, q)

    table = _rows(cache_batch_idx, num_seqs, q.device) if table is None else table.contiguous()
    cache = Cache(k_cache, v_cache, table)
    lens = _lengths(cache_seqlens, cache.room, num_seqs, q.device)
    appended = None
    if k is not None and v is not None:
        # A negative length must stay negative when new tokens are added.
        lens = lens if isinstance(cache_seqlens, int) else lens.where(lens >= 0, -(2**30))
        new, k, v = Tokens.of(k, cu_seqlens_k_new), as_rows(k), as_rows(v)
        if rotary_cos is not None and rotary_sin is not None:
            start = lens if rotary_seqlens is None else rotary_seqlens.contiguous()
            of_keys = of_queries = new.positions(start)
            if q.dim() == 3 or q.shape[1] != new.length or not (causal or new.length == 1):
                of_queries = Tokens.of(q, cu_seqlens_q).positions(start, advancing=causal)
            rows, k = rotate(rows, k, rotary_cos, rotary_sin, of_queries, of_keys, rotary_interleaved)
        appended = k, v, new, lens
        lens = lens + new.counts
    if cache_leftpad is None:
        pages = cache.pages()
    else:
        pages, lens = cache.without_first(cache_leftpad), (lens - cache_leftpad).clamp(min=lens.clamp(max=0))

    dense = (num_seqs, q.shape[1]) if cu_seqlens_q is None else (None, 1)
    lse = lse_rows(rows, dense[0]) if with_lse else None
    args: tuple[Any, ...]
    if cu_seqlens_q is None and (q.shape[1] == 1 or _few(q, k_cache)):
        attention = OPS["attention_decode"]
        args = (rows, *pages, lens, None, None, None, None, scale, causal, False, to, lse, None)
    else:
        attention = OPS["attention_prefill"]
        bounds = even_bounds(num_seqs, q.shape[1], q.device) if cu_seqlens_q is None else cu_seqlens_q.contiguous()
        args = (rows, *pages, lens, bounds, None, None, None, None, scale, causal, False, to, lse)
    if appended is not None:
        if not is_compiling():  # tracing evaluates the checks ahead of any call
            # The check for overlapping memory takes 40 us; an `out` allocated here overlaps nothing.
            with_their_names(attention.check if is_ours else attention.check_all, args)
        cache.append(*appended)
    with_their_names(attention, *args)
    return delivered(out, lse, *dense)


def _rows(cache_batch_idx: Tensor | None, num_seqs: int, device: torch.device) -> Tensor:
    """[B, 1]: each sequence's row of the cache, as a page table with one page."""
    if cache_batch_idx is not None:
        return cache_batch_idx[:, None]
    return torch.arange(num_seqs, dtype=torch.int32, device=device)[:, None]


def _lengths(cache_seqlens: int | Tensor | None, room: int, num_seqs: int, device: torch.device) -> Tensor:
    """[B]: tokens of each sequence in the cache."""
    if isinstance(cache_seqlens, Tensor):
        return cache_seqlens.contiguous()
    length = room if cache_seqlens is None else cache_seqlens
    return torch.full((num_seqs,), length, dtype=torch.int32, device=device)


def _few(q: Tensor, k_cache: Tensor) -> bool:
    """Whether one program of attention_decode can hold all queries of a sequence that share a key head.

    64 rows of 128 numbers are 64 registers per thread, the limit of prefill_heuristic (kernels/launch/heuristics.py).
    """
    _, len_q, num_heads, head_dim = q.shape
    return len_q * (num_heads // k_cache.shape[2]) * head_dim <= 64 * 128
