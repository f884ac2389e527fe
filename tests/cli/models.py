"""A small random model with a tokenizer of its own, in a Hugging Face folder: the subject of the command tests."""

from __future__ import annotations

import functools
import io
import os
from pathlib import Path
from typing import Any

import sentencepiece
import torch

from fastllama import LlamaConfig, LlamaForCausalLM, save_model

# These models are too small for two threads, and the tests may run in several processes. Numba's pool is as large as
# this is set to at import, whatever share of it is used, and its idle threads spin.
torch.set_num_threads(1)
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

WORDS = "once upon a time there was a small fox who lived in the forest and liked to tell long stories to the birds"
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}


@functools.cache
def tokenizer_model() -> bytes:
    """A SentencePiece tokenizer.model of 300 pieces with byte fallback, as Llama's."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS] * 5),
        model_writer=out,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return out.getvalue()


def random_model(**settings: Any) -> LlamaForCausalLM:
    """Weights large enough that near ties are rare; no two alike by construction, norms included."""
    model = LlamaForCausalLM(LlamaConfig(**{"vocab_size": 300, **SIZES, **settings}))
    generator = torch.Generator().manual_seed(11)
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(values * 0.3 if parameter.dim() == 2 else 1 + values * 0.1)
    return model


def write_model(folder: Path, *, tokenizer: bool = True, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """`random_model` in a new folder."""
    save_model(random_model(**settings).to(dtype), folder)
    if tokenizer:
        (folder / "tokenizer.model").write_bytes(tokenizer_model())
    return folder
