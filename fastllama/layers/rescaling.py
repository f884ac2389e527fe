"""Moves scales of a linear layer's input channels between its weight and what computes the input.

In a block the input of each linear layer is linear in another weight: of the norm before qkv_proj and gate_up_proj, of
v before o_proj (attention mixes tokens, never channels), of up before down_proj (silu(gate) * up). Dividing that
weight, and multiplying the columns of the layer's, leaves the function as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastllama.layers.block import LlamaBlock
from fastllama.layers.config import LlamaConfig

QKV, OUT, GATE_UP, DOWN = LINEARS = "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"


def tied(config: LlamaConfig, name: str, channels: Tensor, reduce: str) -> Tensor:
    """Numbers [K] of a linear layer's input channels, one and the same for those that must have one scale.

    These are channels of o_proj: query heads that share a key-value head read the same values. reduce: "mean" or "amax"
    of theirs.
    """
    if name != OUT:
        return channels
    heads = channels.view(config.num_key_value_heads, -1, config.head_dim)
    return getattr(heads, reduce)(1, keepdim=True).expand_as(heads).flatten()


@torch.no_grad()
def rescale(block: LlamaBlock, config: LlamaConfig, name: str, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Divide the input channels of one of LINEARS, and multiply its weight's columns, in place.

    block: of dense layers, in fp32 unless all scales are powers of two, which its dtype then takes without a rounding.
    scales: [K], `tied`. dtype: what a norm's weight will be kept in; it is rounded to it here, and the columns make up
    for that; what it does not hold stays undivided. Returns what the columns were multiplied by, fp32 [K].
    """
    columns = scales.float()
    if name == OUT:
        heads = columns.view(config.num_key_value_heads, -1, config.head_dim)
        _divide_rows(block.self_attn.qkv_proj, config.qkv_size - config.kv_size, heads[:, 0].flatten())
    elif name == DOWN:
        _divide_rows(block.mlp.gate_up_proj, config.intermediate_size, columns)
    else:
        norm = block.input_layernorm if name == QKV else block.post_attention_layernorm
        before = norm.weight.float()
        after = (before / columns).to(dtype).float()
        after = torch.where((after != 0) & after.isfinite(), after, before)
        columns = torch.where(before == 0, columns, before / after)
        norm.weight.copy_(after)
    weight = block.get_parameter(f"{name}.weight")
    weight.copy_(weight.float() * columns)
    return columns


def _divide_rows(linear: torch.nn.Module, start: int, scales: Tensor) -> None:
    """Divide the outputs of a layer from `start` on."""
    for parameter in linear.parameters():
        rows = parameter[start:]
        rows.copy_(rows.float() / scales.view(-1, *[1] * (rows.dim() - 1)))
