"""Self-attention over the paged KV cache."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastllama import kernels
from fastllama.layers.batch import BatchMeta, LayerKV
from fastllama.layers.config import LlamaConfig
from fastllama.layers.linear import Linear, RMSNorm


class LlamaAttention(nn.Module):
    """Fused qkv projection, rotary embedding and KV write, attention, output projection."""

    def __init__(self, config: LlamaConfig, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.qkv_proj = Linear(config.hidden_size, config.qkv_size, config.attention_bias, dtype, device)
        self.o_proj = Linear(config.q_size, config.hidden_size, config.attention_bias, dtype, device)

    def forward(self, hidden: Tensor, norm: RMSNorm, batch: BatchMeta, kv: LayerKV, cos_sin: Tensor) -> Tensor:
        """Add attention of norm(hidden) to hidden [T, H] in place, and write keys and values into kv."""
        qkv = self.qkv_proj(hidden, batch, norm=norm)
        pages = kv.k_pages, kv.v_pages
        q = kernels.rope_and_write_kv(qkv, cos_sin, batch.positions, batch.slots, *pages, kv.k_scales, kv.v_scales)
        out = torch.empty_like(q)
        decodes, total = batch.num_decodes, batch.seq_lens.shape[0]
        split = decodes * batch.num_queries  # tokens of decodes
        if decodes:
            kernels.attention_decode(
                q[:split],
                *pages,
                batch.page_table[:decodes],
                batch.seq_lens[:decodes],
                k_scales=kv.k_scales,
                v_scales=kv.v_scales,
                out=out[:split],
            )
        if decodes < total:
            kernels.attention_prefill(
                q[split:],
                *pages,
                batch.page_table[decodes:],
                batch.seq_lens[decodes:],
                batch.cu_seqlens_q,
                k_scales=kv.k_scales,
                v_scales=kv.v_scales,
                out=out[split:],
            )
        return self.o_proj(out.flatten(1), batch, residual=hidden)
