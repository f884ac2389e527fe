"""Peers of attention: torch's own ops, fused and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from fastllama.bench.ops.compiling import compiled
from fastllama.bench.ops.formulas import Function
from fastllama.catalogue.maker import Arguments

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """scaled_dot_product_attention of [batch, length, heads, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def sdpa_varlen(t: Arguments) -> Tensor:
    return _attend(t["q"][None], t["k"][None], t["v"][None], causal=True)[0]


def sdpa_prefill(t: Arguments) -> Tensor:
    k, v = (_gathered(t, name, t["q"].shape[0]) for name in "kv")
    return _attend(t["q"][None], k, v, causal=True)[0]


def sdpa_decode(t: Arguments) -> Tensor:
    """Gathers the pages first: torch has no paged attention. Every page is full here."""
    length = t["page_table"].shape[1] * t["k_pages"].shape[2]
    k, v = (_gathered(t, name, length) for name in "kv")
    return _attend(t["q"][:, None], k, v, causal=False)[:, 0]


def compiled_flex(backend: str) -> Attend:
    """Causal flex_attention of [length, heads, D], compiled by a backend for each shape.

    Raises where it cannot be compiled: uncompiled it materializes all scores. The mask of a length is made at its first
    call, and not timed, as a model would make it once for all layers.
    """
    alone = compiled(flex_attention, backend, fullgraph=True)
    masks: dict[int, Any] = {}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[0]
        if length not in masks:
            masks[length] = create_block_mask(_sees, None, None, length, length, device=q.device)
        heads = (x.transpose(0, 1)[None] for x in (q, k, v))
        return alone(*heads, block_mask=masks[length], enable_gqa=q.shape[1] != k.shape[1])[0].transpose(0, 1)

    return attend


def _sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def flex_varlen(attend: Attend) -> Function:
    return lambda t: attend(t["q"], t["k"], t["v"])


def flex_prefill(attend: Attend) -> Function:
    def run(t: Arguments) -> Tensor:
        k, v = (_gathered(t, name, t["q"].shape[0])[0] for name in "kv")
        return attend(t["q"], k, v)

    return run


def _gathered(t: Arguments, name: str, length: int) -> Tensor:
    """Dequantized keys or values [batch, length, heads, D], gathered from pages [P, heads, page, D]."""
    held = t[f"{name}_pages"][t["page_table"]]
    if t[f"{name}_scales"] is not None:
        held = (held * t[f"{name}_scales"][t["page_table"]][..., None]).to(t["q"].dtype)
    return held.transpose(2, 3).flatten(1, 2)[:, :length]


FLEX: dict[str, tuple[str, Callable[[Attend], Function]]] = {
    "attention_varlen": ("", flex_varlen),
    "attention_prefill": (", gathered", flex_prefill),
}
