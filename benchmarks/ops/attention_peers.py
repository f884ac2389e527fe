"""What else computes attention: torch's own, fused and compiled, and the libraries that have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.ops.compiling import compiled
from benchmarks.ops.inputs import Inputs

Function = Callable[[Inputs], Any]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """scaled_dot_product_attention of [batch, length, heads, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def sdpa_varlen(t: Inputs) -> Tensor:
    return _attend(*(t[name][None] for name in "qkv"), causal=True)[0]


def sdpa_prefill(t: Inputs) -> Tensor:
    k, v = (_gathered(t, name, t["q"].shape[0]) for name in "kv")
    return _attend(t["q"][None], k, v, causal=True)[0]


def sdpa_decode(t: Inputs) -> Tensor:
    """Over pages that are gathered first: torch has no paged attention. Every page is full here."""
    length = t["page_table"].shape[1] * t["k_pages"].shape[2]
    k, v = (_gathered(t, name, length) for name in "kv")
    return _attend(t["q"][:, None], k, v, causal=False)[:, 0]


def compiled_flex(backend: str) -> Attend:
    """Causal flex_attention of [length, heads, D], compiled by a backend for each shape that it meets.

    An error where it cannot be compiled: uncompiled it holds all scores. The mask of a length is made at its first
    call, as it would be once for all layers: not timed.
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
    def run(t: Inputs) -> Tensor:
        k, v = (_gathered(t, name, t["q"].shape[0])[0] for name in "kv")
        return attend(t["q"], k, v)

    return run


def _gathered(t: Inputs, name: str, length: int) -> Tensor:
    """Keys or values [batch, length, heads, D] out of pages [P, heads, page, D], dequantized."""
    held = t[f"{name}_pages"][t["page_table"]]
    if f"{name}_scales" in t:
        held = (held * t[f"{name}_scales"][t["page_table"]][..., None]).to(t["q"].dtype)
    return held.transpose(2, 3).flatten(1, 2)[:, :length]


def flashinfer_decode(module: Any) -> Function:
    """Planned at the first call of each set of inputs, as an engine plans once a step for all layers: not timed."""
    memory: dict[str, Tensor] = {}
    planned: dict[int, Any] = {}

    def plan(t: Inputs) -> Any:
        q, table, length = t["q"], t["page_table"], int(t["seq_lens"][0])
        _, kv_heads, page_size, head_dim = t["k_pages"].shape
        workspace = memory.setdefault("workspace", torch.empty(256 << 20, dtype=torch.uint8, device=q.device))
        wrapper = module.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "HND", use_tensor_cores=q.shape[1] // kv_heads >= 4
        )
        starts = torch.arange(q.shape[0] + 1, dtype=torch.int32) * table.shape[1]
        last = torch.full((q.shape[0],), (length - 1) % page_size + 1, dtype=torch.int32)
        sizes = (q.shape[1], kv_heads, head_dim, page_size)
        wrapper.plan(starts, table.flatten(), last, *sizes, q_data_type=q.dtype, kv_data_type=q.dtype)
        return wrapper

    def run(t: Inputs) -> Tensor:
        if "k_scales" in t:
            raise NotImplementedError("int8 pages with a scale for each token and head")
        key = t["page_table"].data_ptr()
        if key not in planned:
            planned[key] = plan(t)
        return planned[key].run(t["q"], (t["k_pages"], t["v_pages"]), out=t["out"])

    return run


def flashinfer_varlen(module: Any) -> Function:
    return lambda t: module.single_prefill_with_kv_cache(t["q"], t["k"], t["v"], causal=True)


def xformers_decode(module: Any) -> Function:
    """The split-K kernel in Triton. Biases are made at the first call of each set of inputs: not timed.

    It wants tokens at one stride through all pages, [1, tokens, heads, D], where ours are [pages, heads, slots, D]: so
    each head of a page is a page by itself here and each head of a sequence a sequence, and nothing is copied.
    """
    planned: dict[int, tuple[Tensor, Any]] = {}  # the page table is held, or another could come to lie at its address

    def plan(t: Inputs) -> Any:
        table, (_, kv_heads, page_size, _) = t["page_table"], t["k_pages"].shape
        heads = torch.arange(kv_heads, dtype=torch.int32, device=table.device)
        lengths = t["seq_lens"].repeat_interleave(kv_heads).tolist()
        return module.attn_bias.PagedBlockDiagonalPaddedKeysMask.from_seqlens(
            q_seqlen=[1] * len(lengths),
            kv_seqlen=lengths,
            block_tables=(table[:, None] * kv_heads + heads[:, None]).flatten(0, 1),
            page_size=page_size,
            device=table.device,
        )

    def run(t: Inputs) -> Tensor:
        if "k_scales" in t:
            raise NotImplementedError("int8 pages with a scale for each token and head")
        q, table = t["q"], t["page_table"]
        if table.data_ptr() not in planned:
            planned[table.data_ptr()] = table, plan(t)
        grouped = q.view(1, -1, q.shape[1] // t["k_pages"].shape[1], q.shape[2])  # queries of one key head a row
        pages = (t[name].view(1, -1, 1, q.shape[2]) for name in ("k_pages", "v_pages"))
        k, v = (held.expand(-1, -1, grouped.shape[2], -1) for held in pages)
        _, bias = planned[table.data_ptr()]
        return module.memory_efficient_attention_forward(grouped, k, v, bias, op=module.triton_splitk.FwOp).view_as(q)

    return run


def flash_attn_varlen(module: Any) -> Function:
    def run(t: Inputs) -> Tensor:
        bounds, rows = t["cu_seqlens_q"], t["q"].shape[0]
        return module.flash_attn_varlen_func(t["q"], t["k"], t["v"], bounds, bounds, rows, rows, causal=True)

    return run


FLEX: dict[str, tuple[str, Callable[[Attend], Function]]] = {
    "attention_varlen": ("", flex_varlen),
    "attention_prefill": (", gathered", flex_prefill),
}
