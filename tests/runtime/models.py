"""Tiny random Llamas with decisive logits, as transformers and as ours, and LLMs whose pages are counted at the end."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor

from fastllama import LLM, LlamaConfig, LlamaForCausalLM
from fastllama.layers.batch import BatchMeta, KVCache
from fastllama.layers.loading import load_weights
from fastllama.runtime.engine import Engine
from tests.io.checkpoints import hf_state, random_llama

torch.set_num_threads(1)  # these models are too small for two, and the tests may run in several processes

VOCAB = 97
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 8.0, "original_max_position_embeddings": 64}
SHAPES: Mapping[str, dict[str, Any]] = {
    "mha": {"kv_heads": 4},
    "gqa tied": {"kv_heads": 2, "tied": True},
    "mqa": {"kv_heads": 1},
    "wide heads": {"kv_heads": 2, "head_dim": 24},
    "biases": {"kv_heads": 2, "attention_bias": True, "mlp_bias": True},
    "llama3 rope": {"kv_heads": 2, "rope_parameters": LLAMA3_ROPE},
    "yarn rope": {"kv_heads": 2, "rope_parameters": YARN_ROPE},
}


@functools.cache
def theirs(shape: str = "gqa tied", vocab_size: int = VOCAB) -> transformers.LlamaForCausalLM:
    """A random transformers model in fp32. Its weights are large, so that near ties are rare and attention is sharp."""
    sizes = {
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "vocab_size": vocab_size,
        "max_position_embeddings": 512,
    }
    model = random_llama(**(sizes | SHAPES[shape]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim == 2 else 1)
    model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
    return model


@functools.cache
def _theirs_in_fp64(shape: str) -> transformers.LlamaForCausalLM:
    return copy.deepcopy(theirs(shape)).double()


@torch.inference_mode()
def logits_of(ids: Sequence[int], shape: str = "gqa tied") -> Tensor:
    """transformers' logits [T, V] in fp64 (its norms and rotary angles are fp32 all the same)."""
    return _theirs_in_fp64(shape)(torch.tensor([list(ids)])).logits[0]


def ours(
    shape: str = "gqa tied",
    vocab_size: int = VOCAB,
    *,
    dtype: torch.dtype = torch.float64,
    eos: tuple[int, ...] = (),
    kind: type[LlamaForCausalLM] = LlamaForCausalLM,
) -> LlamaForCausalLM:
    """The same model as ours. In fp64 rounding, which may vary with the batch, is too small to change a sample."""
    model = theirs(shape, vocab_size)
    config = replace(LlamaConfig.from_hf(model.config.to_dict()), eos_token_ids=eos)
    built = kind(config, dtype)
    load_weights(built, hf_state(model).items())
    return built.eval()


class Scripted(LlamaForCausalLM):
    """A model whose likeliest token at position p is script[p], whatever came before; BROKEN stands for NaN logits."""

    script: list[int]
    BROKEN = -1

    def forward(self, ids: Tensor, batch: BatchMeta, kv: KVCache) -> Tensor:
        """Logits 9 for the wanted token, -9 for all others."""
        wanted = torch.tensor(self.script)[batch.positions[batch.logits_rows] + 1]
        logits = torch.where(torch.arange(self.config.vocab_size) == wanted[:, None], 9.0, -9.0)
        return torch.where(wanted[:, None] == self.BROKEN, torch.nan, logits)


@contextmanager
def running(model: LlamaForCausalLM, **options: Any) -> Iterator[LLM]:
    """An LLM over a small cache; when the test is through, every page must be back and nothing queued."""
    sizes = {"kv_cache_tokens": 1024, "max_model_len": 256, "page_size": 16, "progress": False}
    with LLM(model, **(sizes | options)) as llm:
        yield llm
        check_idle(llm.engine)


def check_idle(engine: Engine) -> None:
    """Assert that no request is left and no page held."""
    engine.pool.check_invariants()
    assert engine.pool.num_available == engine.pool.num_pages
    assert not engine.has_work
    assert engine.step() == []
    assert engine._requests.generations == {}


def prompt_of(length: int, seed: int = 0, vocab_size: int = VOCAB) -> list[int]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(3, vocab_size, (length,), generator=generator).tolist()
