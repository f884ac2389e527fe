"""Moves scales of a linear layer's input channels between its weight and the weight that computes the input.

In a block the input of each linear layer is linear in another weight: of the norm before qkv_proj and gate_up_proj, of
v before o_proj (attention mixes tokens, never channels), of up before down_proj (silu(gate) * up). Dividing that
weight and multiplying the layer's columns leaves the function unchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastllama.layers.block import LlamaBlock
from fastllama.layers.config import LlamaConfig

QKV, OUT, GATE_UP, DOWN = LINEARS = "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"


def tied(config: LlamaConfig, name: str, channels: Tensor, reduce: str) -> Tensor:
    """Numbers [K] of a linear layer's input channels, reduced over the channels that must share a scale.

    These are channels of o_proj: query heads that share a key-value head read the same values. reduce: "mean" or
    "amax".
    """
    if name != OUT:
        return channels
    heads = channels.view(config.num_key_value_heads, -1, config.head_dim)
    return getattr(heads, reduce)(1, keepdim=True).expand_as(heads).flatten()


@torch.no_grad()
def rescale(block: LlamaBlock, config: LlamaConfig, name: str, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Divide the input channels of one of LINEARS, and multiply its weight's columns, in place.

    block: of dense layers, in fp32 unless all scales are powers of two, which any dtype divides by without rounding.
    scales: [K], `tied`. dtype: of the norm's weight in the result, to which it is rounded here; the columns compensate
    for the rounding, and a channel that would under- or overflow is not divided. Returns the columns' factors, fp32
    [K].
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
    """Divide the output channels of a layer from `start` on."""
    for parameter in linear.parameters():
        rows = parameter[start:]
        rows.copy_(rows.float() / scales.view(-1, *[1] * (rows.dim() - 1)))
