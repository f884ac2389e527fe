"""Attention of other libraries: FlashInfer, xFormers, flash-attn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastllama.bench.ops.formulas import Function
from fastllama.catalogue.maker import Arguments


def flashinfer_decode(module: Any) -> Function:
    """FlashInfer's decode; plans at the first call with a set of inputs, as an engine plans once a step: not timed."""
    memory: dict[str, Tensor] = {}
    planned: dict[int, Any] = {}

    def plan(t: Arguments) -> Any:
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

    def run(t: Arguments) -> Tensor:
        if t["k_scales"] is not None:
            raise NotImplementedError("int8 pages with a scale for each token and head")
        key = t["page_table"].data_ptr()
        if key not in planned:
            planned[key] = plan(t)
        return planned[key].run(t["q"], (t["k_pages"], t["v_pages"]), out=t["out"])

    return run


def flashinfer_varlen(module: Any) -> Function:
    return lambda t: module.single_prefill_with_kv_cache(t["q"], t["k"], t["v"], causal=True)


def xformers_decode(module: Any) -> Function:
    """xFormers' split-K kernel in Triton. Biases are made at the first call with each set of inputs: not timed.

    It expects tokens at one stride through all pages, [1, tokens, heads, D]; here pages are [pages, heads, slots, D].
    So each head of a page is passed as a page, and each head of a sequence as a sequence, without a copy.
    """
    planned: dict[int, tuple[Tensor, Any]] = {}  # holds the page table, so that no other gets its address

    def plan(t: Arguments) -> Any:
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

    def run(t: Arguments) -> Tensor:
        if t["k_scales"] is not None:
            raise NotImplementedError("int8 pages with a scale for each token and head")
        q, table = t["q"], t["page_table"]
        if table.data_ptr() not in planned:
            planned[table.data_ptr()] = table, plan(t)
        grouped = q.view(1, -1, q.shape[1] // t["k_pages"].shape[1], q.shape[2])  # the queries of one KV head are a row
        pages = (t[name].view(1, -1, 1, q.shape[2]) for name in ("k_pages", "v_pages"))
        k, v = (held.expand(-1, -1, grouped.shape[2], -1) for held in pages)
        _, bias = planned[table.data_ptr()]
        return module.memory_efficient_attention_forward(grouped, k, v, bias, op=module.triton_splitk.FwOp).view_as(q)

    return run


def flash_attn_varlen(module: Any) -> Function:
    def run(t: Arguments) -> Tensor:
        bounds, rows = t["cu_seqlens_q"], t["q"].shape[0]
        return module.flash_attn_varlen_func(t["q"], t["k"], t["v"], bounds, bounds, rows, rows, causal=True)

    return run
