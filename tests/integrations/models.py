"""Small random Llamas of transformers, stock beside patched, and names that its versions spell otherwise."""

from __future__ import annotations

import copy
import inspect
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

import fastllama
from fastllama import env

torch.set_num_threads(1)  # these models are too small for two, and the tests may run in several processes
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

INTERPRETED = env.triton_interpret()  # where a launch takes 10 to 100 ms
NEW_TOKENS = 4 if INTERPRETED else 20
VOCAB = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
if INTERPRETED:
    SIZES |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    SIZES |= {"num_key_value_heads": 1}
# transformers 5.24 renamed the argument and the output.
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
BEFORE_5 = "cache_position" in inspect.signature(LlamaForCausalLM.forward).parameters

IDS = torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(1))
LEFT = torch.ones(3, 9, dtype=torch.long)
LEFT[0, :4] = 0
LEFT[2, :1] = 0
RIGHT = LEFT.flip(1)
HOLES = torch.ones(3, 9, dtype=torch.long)
HOLES[1, 3] = HOLES[2, 5:7] = 0


def llama(dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    """A model in which every parameter, biases and norms too, is random."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(SIZES | sizes)))
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1 if "norm" in name else 0, 0.1)
    return model.to(dtype).eval()


def pair(dtype: torch.dtype = torch.float32, **sizes: Any) -> tuple[Any, Any]:
    """The same model twice: stock and patched."""
    stock = llama(dtype, **sizes)
    patched = copy.deepcopy(stock)
    report = fastllama.patch(patched, strict=True)
    assert report.patched == report.layers == stock.config.num_hidden_layers
    return stock, patched


def on_our_ops(model: Any) -> bool:
    """Whether a forward runs every layer on our ops: transformers' forward calls torch for each linear layer."""
    with torch.inference_mode(), mock.patch.object(functional, "linear", wraps=functional.linear) as linear:
        model(IDS)
    return linear.call_count == 1  # the output head


def cache_of(output: Any) -> Any:
    """The KV cache that a forward returned."""
    return getattr(output, CACHE)


def assert_close(found: Tensor, expected: Tensor, where: Tensor | None = None, bound: float = 1e-5) -> None:
    """Equal but for the order of additions, where `where` is not 0; logits are of the order of 1."""
    error = (found.float() - expected.float()).abs()
    if where is not None:
        error = error[where.bool()]
    assert not error.isnan().any()
    assert error.max() < bound * max(expected.abs().max().item(), 1)
