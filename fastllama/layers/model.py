"""The whole model: token ids in, logits of selected rows out."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from fastllama import kernels
from fastllama.errors import check_range
from fastllama.layers.batch import BatchMeta, KVCache
from fastllama.layers.block import LlamaBlock
from fastllama.layers.config import LlamaConfig
from fastllama.layers.linear import Linear, LinearBase, PackedLinear, RMSNorm, parameter
from fastllama.layers.rope import rotary_cache


class Embedding(nn.Module):
    """Token embeddings [vocab_size, hidden_size]."""

    def __init__(self, config: LlamaConfig, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.weight = parameter(config.vocab_size, config.hidden_size, dtype=dtype, device=device)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [T] -> [T, H]."""
        return kernels.embedding(ids, self.weight)


class LlamaForCausalLM(nn.Module):
    """Llama over a paged KV cache, weights uninitialised until `layers.loading.load_weights` fills them.

    q, k, v are fused into one matrix, gate, up into another. With tied embeddings lm_head.weight is
    embed_tokens.weight itself. tokenizer, sampling_settings, name_or_path: LLM's defaults, set by `from_transformers`.
    """

    tokenizer: Any = None
    sampling_settings: Mapping[str, Any] = MappingProxyType({})  # by SamplingParams' names
    name_or_path: str | None = None

    _cos_sin: Tensor | None

    def __init__(
        self, config: LlamaConfig, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config, dtype, device)
        self.layers = nn.ModuleList(LlamaBlock(config, dtype, device) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        if config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, False, dtype, "meta")
            self.lm_head.weight = self.embed_tokens.weight
        else:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, False, dtype, device)
        self.register_buffer("_cos_sin", None, persistent=False)

    def rotary_cache(self, max_model_len: int) -> Tensor:
        """A rotary cache [max_model_len, head_dim] fp32 on the weights' device.

        Raises ValueError for more positions than the configuration's rope supports.
        """
        check_range("max_model_len", max_model_len, 1, self.config.longest_context)
        return rotary_cache(self.config, max_model_len, self.embed_tokens.weight.device)

    def set_max_model_len(self, max_model_len: int) -> None:
        """Set the model's own rotary cache to max_model_len positions; a batch may have another."""
        self._cos_sin = self.rotary_cache(max_model_len)

    @property
    def cos_sin(self) -> Tensor:
        """The rotary cache [positions, head_dim] fp32; by default, of the configuration's whole context.

        Computed on first use: a context of millions takes gigabytes, and the runtime needs fewer positions.
        """
        if self._cos_sin is None:
            self.set_max_model_len(self.config.context_length)
            assert self._cos_sin is not None
        return self._cos_sin

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights and activations."""
        return self.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed_tokens.weight.device

    @property
    def num_parameters(self) -> int:
        """Elements of all dense weights; packed weights count as dense."""
        packed = [module for module in self.modules() if isinstance(module, PackedLinear)]
        return sum(p.numel() for p in self.parameters()) + sum(linear.num_weights for linear in packed)

    def workspace(self, num_tokens: int) -> Tensor | None:
        """Scratch memory for the matmuls of steps of up to num_tokens tokens, one step at a time; None if not needed.

        The largest workspace of any layer: 4096 counters, which are 0 between steps, and the partial sums of split-K
        or, for many rows, a dequantized weight.
        """
        linears = [module for module in self.modules() if isinstance(module, LinearBase)]
        largest = max((linear.workspace(num_tokens, self.dtype) for linear in linears), key=Tensor.numel)
        return largest if largest.numel() else None

    @property
    def splits(self) -> bool:
        """Whether a call equals `hidden_states` and `head`: no forward is overridden, and no hook is on the logits."""
        return (
            type(self).forward is LlamaForCausalLM.forward
            and "forward" not in vars(self)
            and not any(each._forward_hooks or each._forward_pre_hooks for each in (self, self.lm_head))
        )

    def forward(self, ids: Tensor, batch: BatchMeta, kv: KVCache) -> Tensor:
        """ids [T] -> logits [R, V] of batch.logits_rows, in the model's dtype; keys and values are written into kv."""
        return self.head(self.hidden_states(ids, batch, kv), batch)

    def hidden_states(self, ids: Tensor, batch: BatchMeta, kv: KVCache) -> Tensor:
        """ids [T] -> output of the last block for batch.logits_rows [R, H]; keys and values are written into kv."""
        hidden = self.embed_tokens(ids)
        cos_sin = self.cos_sin if batch.cos_sin is None else batch.cos_sin
        for block, layer_kv in zip(self.layers, kv.layers, strict=True):
            hidden = block(hidden, batch, layer_kv, cos_sin)
        rows = batch.logits_rows
        return hidden if rows.shape[0] == ids.shape[0] else hidden.index_select(0, rows)

    def head(self, hidden: Tensor, batch: BatchMeta) -> Tensor:
        """Logits [R, V] of hidden states [R, H], any of a batch: the last norm and lm_head."""
        return self.lm_head(hidden, batch, norm=self.norm)


_RUNNERS: WeakKeyDictionary[LlamaForCausalLM, WeakSet[Any]] = WeakKeyDictionary()


def runners(model: LlamaForCausalLM) -> WeakSet[Any]:
    """The runtimes of a model, whose captured steps and cached keys and values depend on its present weights."""
    return _RUNNERS.setdefault(model, WeakSet())
