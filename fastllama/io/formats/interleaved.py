"""Shared by Meta's and llama2.c's checkpoints: tensor names within a layer, and interleaved rotary pairs."""

from __future__ import annotations

from torch import Tensor

from fastllama.errors import CheckpointError
from fastllama.layers.config import LlamaConfig

# Meta's name within a layer -> (Hugging Face's, the dimension model parallelism splits it along; None: replicated).
# Column-parallel layers split their rows, row-parallel ones their columns (facebookresearch/llama, model.py).
LAYER_NAMES: dict[str, tuple[str, int | None]] = {
    "attention_norm": ("input_layernorm", None),
    "attention.wq": ("self_attn.q_proj", 0),
    "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1),
    "ffn_norm": ("post_attention_layernorm", None),
    "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1),
    "feed_forward.w3": ("mlp.up_proj", 0),
}


def rotary_heads(hf_name: str, config: LlamaConfig) -> int | None:
    """Number of heads in a tensor's rows that get the rotary embedding: q_proj and k_proj; None for the rest."""
    if hf_name.endswith("q_proj.weight"):
        return config.num_attention_heads
    return config.num_key_value_heads if hf_name.endswith("k_proj.weight") else None


def half_split(weight: Tensor, heads: int, what: str) -> Tensor:
    """Reorder the rows of each head from Meta's rotary pairs (0,1)(2,3)... to Hugging Face's (0,d/2)(1,d/2+1)....

    weight [heads * d, in] -> the same shape. Even rows come first, then odd ones; attention scores do not change.
    """
    if weight.ndim != 2 or weight.shape[0] % (2 * heads):
        raise CheckpointError(
            f"{what} has shape {list(weight.shape)}, expected a matrix whose rows make {heads} even heads"
        )
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
