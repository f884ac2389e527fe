"""flash_attn_func, flash_attn_varlen_func and their packed forms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastllama.errors import check_dtype, check_shape
from fastllama.integrations.flash_attn.conventions import (
    Result,
    Window,
    any_flag,
    as_rows,
    check_heads,
    check_inputs,
    check_integers,
    check_pages,
    delivered,
    even_bounds,
    flag,
    lse_rows,
    one_of,
    refuse,
    result_rows,
    scale_of,
)
from fastllama.kernels import attention_prefill, attention_varlen
from fastllama.kernels.dispatch.checks import FLOATS


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    attention_chunk: int | None = 0,
    learnable_sink: Tensor | None = None,
    s_aux: Tensor | None = None,
    score_mod: Any = None,
    mask_mod: Any = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    out: Tensor | None = None,
    return_lse: bool = False,
    return_softmax_lse: bool = False,
) -> Result:
    """Attention of sequences of equal length: softmax(softmax_scale * q k^T) v.

    q: [B, Sq, Hq, D], k, v: [B, Sk, Hkv, D], one floating dtype, Hq a multiple of Hkv. softmax_scale: defaults to
    1 / sqrt(D). causal: bottom-right aligned, query i sees keys up to i + Sk - Sq. out: like q; allocated when None.
    Returns out; with return_lse or return_softmax_lse (out, lse [B, Hq, Sq] fp32), natural; with return_attn_probs
    (out, lse, an empty tensor), as flash-attn without dropout. A row without keys gives 0 and the log-sum-exp +inf.
    Performance hints have no effect: deterministic, num_splits, pack_gqa, sm_margin.
    Raises NotImplementedError for an unsupported argument, RuntimeError for tensors that require grad under grad mode,
    ValueError for a shape or device, TypeError for a dtype; nothing is written then.
    Source: flash-attn 2.8.3, `flash_attn_interface.py`; keyword arguments also of FlashAttention 3 and its CuTe form.
    """
    causal = flag("causal", causal)
    refuse(
        "flash_attn_func",
        causal=causal,
        dropout_p=dropout_p,
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
        score_mod=score_mod,
        mask_mod=mask_mod,
    )
    check_inputs("flash_attn_func", {"q": q, "k": k, "v": v}, out=out)
    with_lse = any_flag(
        return_attn_probs=return_attn_probs, return_lse=return_lse, return_softmax_lse=return_softmax_lse
    )
    check_shape("q", q, ("B", "Sq", "Hq", "D"))
    num_seqs, len_q = q.shape[:2]
    check_shape("k", k, (num_seqs, "Sk", "Hkv", "D"))
    check_heads("k", k, q)
    check_shape("v", v, k.shape)
    len_k = k.shape[1]
    scale, rows, (out, to) = scale_of(softmax_scale, q), as_rows(q), result_rows(out, q)
    bounds = even_bounds(num_seqs, len_q, q.device)
    bounds_k = bounds if len_k == len_q else even_bounds(num_seqs, len_k, q.device)
    lse = lse_rows(rows, num_seqs) if with_lse else None
    attention_varlen(rows, as_rows(k), as_rows(v), bounds, bounds_k, scale=scale, causal=causal, out=to, lse_out=lse)
    return delivered(out, lse, num_seqs, len_q, return_attn_probs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: Any = None,
    max_seqlen_k: Any = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    page_table: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    attention_chunk: int | None = 0,
    learnable_sink: Tensor | None = None,
    s_aux: Tensor | None = None,
    score_mod: Any = None,
    mask_mod: Any = None,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    fa_version: int | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    return_softmax_lse: bool = False,
) -> Result:
    """Attention of packed sequences of any lengths; keys and values are packed too, or in pages.

    q: [total_q, Hq, D], cu_seqlens_q: [B + 1], cumulative row bounds, from 0; rows past the last bound give 0.
    k, v: [total_k, Hkv, D] with cu_seqlens_k [B + 1]; or pages [P, page_size, Hkv, D] of any page size, with
    block_table (page_table) [B, pages], each sequence's pages in order. All integer tensors int32 or int64.
    seqused_k: [B], number of leading keys of each sequence that are used; with pages, its length, instead of
    cu_seqlens_k. seqused_q: [B], number of leading queries of each sequence that are used; the others give 0.
    Where cu_seqlens_q or cu_seqlens_k is None, q or k and v are [B, S, H, D].
    causal: bottom-right aligned. Returns out like q, and log-sum-exps as `flash_attn_func`: [Hq, total_q], or
    [B, Hq, Sq] without cu_seqlens_q. max_seqlen_q, max_seqlen_k, scheduler_metadata, fa_version have no effect, as the
    hints of `flash_attn_func`. Bounds that do not ascend within their rows, and lengths beyond a sequence's pages,
    give NaN: they are on the device, and not read on the host.
    Everything else, errors and source: as `flash_attn_func`.
    """
    name = "flash_attn_varlen_func"
    causal = flag("causal", causal)
    refuse(
        name,
        causal=causal,
        dropout_p=dropout_p,
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
        score_mod=score_mod,
        mask_mod=mask_mod,
    )
    check_inputs(
        name,
        {"q": q, "k": k, "v": v},
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        block_table=block_table,
        page_table=page_table,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        out=out,
    )
    with_lse = any_flag(
        return_attn_probs=return_attn_probs, return_lse=return_lse, return_softmax_lse=return_softmax_lse
    )
    table = one_of("block_table", block_table, "page_table", page_table)
    check_shape("q", q, ("total_q", "Hq", "D") if cu_seqlens_q is not None else ("B", "Sq", "Hq", "D"))
    bounds = _bounds("cu_seqlens_q", cu_seqlens_q, q)
    num_seqs, (num_rows, length) = bounds.shape[0] - 1, (None, 1) if cu_seqlens_q is not None else q.shape[:2]
    check_integers("seqused_q", seqused_q, (num_seqs,), q)
    check_integers("seqused_k", seqused_k, (num_seqs,), q)
    scale, rows, (out, to) = scale_of(softmax_scale, q), as_rows(q), result_rows(out, q)
    lse = lse_rows(rows, num_rows) if with_lse else None
    if table is None:
        check_shape("k", k, ("total_k", "Hkv", "D") if cu_seqlens_k is not None else (num_seqs, "Sk", "Hkv", "D"))
        check_heads("k", k, q)
        check_shape("v", v, k.shape)
        bounds_k = _bounds("cu_seqlens_k", cu_seqlens_k, k)
        check_shape("cu_seqlens_k", bounds_k, (num_seqs + 1,))
        if seqused_k is not None:  # unused keys form an extra sequence without queries
            bounds, bounds_k = bounds.repeat_interleave(2)[1:], _used(bounds_k, seqused_k)
            seqused_q = None if seqused_q is None else _and_none(seqused_q)
        if seqused_q is not None:  # unused queries form an extra sequence without keys
            bounds, bounds_k = _used(bounds, seqused_q), bounds_k.repeat_interleave(2)[1:]
        attention_varlen(
            rows, as_rows(k), as_rows(v), bounds, bounds_k, scale=scale, causal=causal, out=to, lse_out=lse
        )
    else:
        check_dtype("q", q, FLOATS)
        check_shape("k", k, ("P", "page_size", "Hkv", "D"))
        check_pages(q, "k", k, "v", v)
        check_integers("page_table" if block_table is None else "block_table", table, (num_seqs, "pages"), q)
        table, lens = table.contiguous(), _lengths(seqused_k, cu_seqlens_k, num_seqs, q)
        if seqused_q is not None:
            bounds, table, lens = _used(bounds, seqused_q), table.repeat_interleave(2, 0), _and_none(lens)
        pages = k.transpose(1, 2), v.transpose(1, 2), table
        attention_prefill(rows, *pages, lens, bounds, scale=scale, causal=causal, out=to, lse_out=lse)
    return delivered(out, lse, num_rows, length, return_attn_probs)


def _bounds(name: str, bounds: Tensor | None, x: Tensor) -> Tensor:
    """Row bounds [B + 1]: the given ones, or those of x [B, S, H, D]."""
    if bounds is None:
        return even_bounds(x.shape[0], x.shape[1], x.device)
    if bounds.shape == (0,):
        raise ValueError(f"{name} has shape [0]; legal: [B + 1]")
    check_integers(name, bounds, ("B + 1",), x)
    return bounds.contiguous()


def _lengths(seqused_k: Tensor | None, cu_seqlens_k: Tensor | None, num_seqs: int, q: Tensor) -> Tensor:
    """The number of keys of each sequence in pages."""
    if seqused_k is not None:
        return seqused_k.contiguous()
    if cu_seqlens_k is None:
        raise ValueError("seqused_k and cu_seqlens_k are None; legal for keys in pages: one of them, a tensor")
    check_integers("cu_seqlens_k", cu_seqlens_k, (num_seqs + 1,), q)
    return cu_seqlens_k.diff()


def _used(bounds: Tensor, used: Tensor) -> Tensor:
    """Bounds of twice as many sequences: the used rows of each, then its unused rows.

    int64 where either is, so that a value beyond int32 stays illegal for the op to find.
    """
    bounds = bounds.to(torch.promote_types(bounds.dtype, used.dtype))
    starts = bounds[:-1]
    return torch.cat((torch.stack((starts, starts + used), 1).flatten(), bounds[-1:]))


def _and_none(counts: Tensor) -> Tensor:
    """Counts of twice as many sequences: each followed by an empty one."""
    return torch.stack((counts, torch.zeros_like(counts)), 1).flatten()
