"""A model that computes nothing: the time of a step is the runtime's overhead."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllama import LlamaConfig, LlamaForCausalLM
from fastllama.layers.batch import BatchMeta, KVCache


class NullModel(LlamaForCausalLM):
    """A Llama that computes nothing."""

    logits: Tensor

    def forward(self, ids: Tensor, batch: BatchMeta, kv: KVCache) -> Tensor:
        """Returns the same logits for each row."""
        return self.logits[: batch.logits_rows.shape[0]]


def null_model(vocab_size: int, rows: int) -> NullModel:
    """Returns a null model with one narrow layer."""
    model = NullModel(LlamaConfig(vocab_size, 8, 8, 1, 1, 1, head_dim=8, eos_token_ids=()))
    model.logits = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(0))
    return model
