"""One transformer block, with the (hidden, residual) contract between blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastllama import kernels
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

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [T, H] -> [T, H]."""
        return self.down_proj(kernels.silu_mul(self.gate_up_proj(hidden)))


class LlamaBlock(nn.Module):
    """Attention and MLP. The sum of both results is the residual stream; the next norm adds them, in one op."""

    def __init__(self, config: LlamaConfig, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self.self_attn = LlamaAttention(config, dtype, device)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self.mlp = LlamaMLP(config, dtype, device)

    def forward(
        self, hidden: Tensor, residual: Tensor | None, batch: BatchMeta, kv: LayerKV, cos_sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(hidden [T, H], residual [T, H], None in the first block) -> the same for the next; both are overwritten."""
        hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.self_attn(hidden, batch, kv, cos_sin)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden), residual
