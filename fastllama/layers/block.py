"""One transformer block, in which each norm, residual sum and SwiGLU is fused with a matmul."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastllama.layers.attention import LlamaAttention
from fastllama.layers.batch import BatchMeta, LayerKV
from fastllama.layers.config import LlamaConfig
from fastllama.layers.linear import Linear, RMSNorm


class LlamaMLP(nn.Module):
    """Fused gate and up projection, silu(gate) * up, down projection."""

    def __init__(self, config: LlamaConfig, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = Linear(hidden, 2 * inner, config.mlp_bias, dtype, device)
        self.down_proj = Linear(inner, hidden, config.mlp_bias, dtype, device)

    def forward(self, hidden: Tensor, norm: RMSNorm, batch: BatchMeta) -> Tensor:
        """Add the MLP of norm(hidden) to hidden [T, H] in place."""
        return self.down_proj(self.gate_up_proj(hidden, batch, norm=norm, gated=True), batch, residual=hidden)


class LlamaBlock(nn.Module):
    """Attention and MLP, each with a residual connection."""

    def __init__(self, config: LlamaConfig, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self.self_attn = LlamaAttention(config, dtype, device)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self.mlp = LlamaMLP(config, dtype, device)

    def forward(self, hidden: Tensor, batch: BatchMeta, kv: LayerKV, cos_sin: Tensor) -> Tensor:
        """Update hidden [T, H], the residual stream, in place."""
        hidden = self.self_attn(hidden, self.input_layernorm, batch, kv, cos_sin)
        return self.mlp(hidden, self.post_attention_layernorm, batch)
