"""Names of tensors that occur in checkpoints of Llamas but are not weights of a Llama."""

from __future__ import annotations

import re

from fastllama.layers.config import LlamaConfig

# Buffers of other implementations, below any prefix: rotary tables (transformers before 4.32, ColossalAI, Meta) and
# causal masks (GPT-like attention).
_RECOMPUTED = re.compile(
    r"(.+\.)?(rotary_(pos_)?emb\..+|rope\.freqs|freqs_cis|(original_)?inv_freq|(cos|sin|cos_sin)_cache[d]?"
    r"|masked_bias|causal_mask|position_ids|(self_attn|attn|attention)\.(bias|mask))"
)
# Tensors of GPTQ, AWQ, bitsandbytes, compressed-tensors and fp8 checkpoints beside or in place of a weight.
_QUANTIZED = re.compile(
    r".+\.(qweight|q?zeros|g_idx|scales|(weight|input|output|activation|q|k|v)_scale(_inv|_2)?|\w+_zero_point"
    r"|weight_(packed|shape|format)|SCB|\w*absmax|\w*quant_map|quant_state\..+)"
)
_LLAMA = re.compile(r"(model|layers|embed_tokens|norm|lm_head|tok_embeddings|output)\..+", re.DOTALL)
_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.(.+)")
_BIAS = re.compile(r"(self_attn\.[qkvo]|mlp\.(?:gate|up|down))_proj\.bias")


def is_recomputed(name: str) -> bool:
    """Whether a tensor is a table or mask that follows from the configuration."""
    return _RECOMPUTED.fullmatch(name) is not None


def is_quantized(name: str) -> bool:
    """Whether a tensor belongs to a quantized weight."""
    return _QUANTIZED.fullmatch(name) is not None


def is_foreign(name: str) -> bool:
    """Whether a tensor is outside of every Llama: a value head, a reward head, a second model."""
    return _LLAMA.fullmatch(name) is None


def undeclared_bias(name: str, config: LlamaConfig) -> str | None:
    """The configuration flag that declares a bias of the model's projections; None for any other tensor."""
    layer = _LAYER.fullmatch(name)
    if layer is None or int(layer[1]) >= config.num_hidden_layers or not _BIAS.fullmatch(layer[2]):
        return None
    return "attention_bias" if layer[2].startswith("self_attn") else "mlp_bias"


def why_unexpected(name: str, config: LlamaConfig) -> str:
    """Why a tensor with the name of a Llama's weight is not a weight of this one."""
    layer = _LAYER.fullmatch(name)
    if layer is not None and int(layer[1]) >= config.num_hidden_layers:
        return f"the configuration has num_hidden_layers={config.num_hidden_layers}"
    return "no part of the Llama that the configuration declares"
