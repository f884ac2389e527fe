"""Attention of a patched model: reads the keys and values of any cache as pages of one token each.

With one-token pages, a page table can express padding, gaps and the layouts of other caches. It costs 4 bytes per
token, compared with 512 for a key and value of 128 numbers in 16 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fastllama import kernels
from fastllama.integrations.transformers.masks import as_booleans, is_key_list
from fastllama.integrations.transformers.shared import PageTable


def pages_of(buffer: Tensor) -> Tensor:
    """A contiguous [B, L, Hkv, D] as one-token pages: [B * L, Hkv, 1, D]."""
    return buffer.view(-1, 1, *buffer.shape[2:]).transpose(1, 2)


def as_pages(k: Tensor, v: Tensor, settled: bool) -> tuple[Tensor, Tensor, int]:
    """Keys and values [B, Hkv, L, D] as one-token pages, and the number of pages between sequences.

    settled: the strides are the same at every call, as a static cache's. Otherwise keys are copied to [B, L, Hkv, D]
    unless they have that layout: the stride between heads is a compile-time constant of the Triton kernels, which would
    be recompiled at each token.
    """
    batch, heads, length, head_dim = k.shape
    step = k.stride(2)
    if settled and k.stride() == v.stride() and k.stride(3) == 1 and k.stride(0) % step == 0:
        row = k.stride(0) // step
        shape = (batch - 1) * row + length, heads, 1, head_dim
        strides = step, k.stride(1), head_dim, 1
        return k.as_strided(shape, strides), v.as_strided(shape, strides), row
    k, v = (tensor.transpose(1, 2).contiguous() for tensor in (k, v))
    return pages_of(k), pages_of(v), length


def is_settled(cache: Cache | None, index: int) -> bool:
    """Whether a cache's layer returns keys with the same strides at every token."""
    layers = getattr(cache, "layers", ())
    return index < len(layers) and getattr(layers[index], "is_compileable", False)


def causal(module: Any, asked: bool | None) -> bool:
    """Whether attention is causal: the call's argument, else the module's attribute."""
    return bool(getattr(module, "is_causal", True) if asked is None else asked)


def attend(q: Tensor, k: Tensor, v: Tensor, table: PageTable, scale: float, workspace: Tensor | None = None) -> Tensor:
    """Causal attention: q [B * S, Hq, D], k, v in pages -> [B * S, Hq, D]. Queries are a sequence's last tokens."""
    out = torch.empty_like(q)
    pages = k, v, table.pages, table.lengths
    if q.shape[0] == table.lengths.shape[0]:
        kernels.attention_decode(q, *pages, scale=scale, out=out, workspace=workspace)
    else:
        kernels.attention_prefill(q, *pages, table.bounds, scale=scale, out=out)
    return out


def attend_by_sdpa(module: Any, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention by torch's SDPA with any mask [B, 1, S, L], keys and values [B, Hkv, L, D]."""
    batch, _, _, head_dim = keys.shape
    query = q.view(batch, -1, *q.shape[1:]).transpose(1, 2)
    out, _ = sdpa_attention_forward(module, query, keys, values, mask, scaling=module.scaling)
    return out.reshape(-1, out.shape[2], head_dim)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function "fastllama", for layers that run transformers' code.

    query: [B, Hq, S, D], key, value: [B, Hkv, L, D]. attention_mask: a key list, or None for causal attention to all
    keys; SDPA handles other masks, gradients, dropout and tensor subclasses.
    Returns [B, S, Hq, D].
    """
    batch, heads, queries, head_dim = query.shape
    ours = attention_mask is None or is_key_list(attention_mask)
    if attention_mask is None and not causal(module, is_causal):
        ours = False
    elif ours and (
        dropout
        or (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad))
        or not type(query) is type(key) is type(value) is Tensor
        or not query.dtype == key.dtype == value.dtype
    ):
        ours, is_causal = False, None
        attention_mask = as_booleans(attention_mask, batch, queries, key.shape[2], query.device)
    if not ours:
        others |= {"scaling": scaling, "dropout": dropout, "is_causal": is_causal}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **others)
    scale = head_dim**-0.5 if scaling is None else scaling
    k, v, row = as_pages(key, value, False)
    table = PageTable.of(attention_mask, batch, queries, key.shape[2], row, query.device)
    q = query.transpose(1, 2).reshape(batch * queries, heads, head_dim)
    return attend(q, k, v, table, scale).view(batch, queries, heads, head_dim), None
