"""fastllama.patch on the device: the numbers and tokens of transformers, and a decode step that never synchronises."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import fastllama
from fastllama.bench.static_cache import compiled
from tests.integrations.models import BEFORE_5, CACHE

pytestmark = pytest.mark.gpu

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LONGEST = 300  # tokens of a static cache


def pair(dtype: torch.dtype) -> tuple[Any, Any]:
    torch.manual_seed(0)
    with torch.device("cuda"):
        stock = LlamaForCausalLM._from_config(LlamaConfig(**SIZES), dtype=dtype).eval()
    patched = copy.deepcopy(stock)
    fastllama.patch(patched, strict=True)
    return stock, patched


@pytest.fixture
def prompt() -> dict[str, Tensor]:
    ids = torch.randint(3, 512, (3, 250), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :37] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():  # graphs of torch.compile take no tensor of inference mode
        yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_as_exact_as_transformers(prompt: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Logits of a prompt, and of the token after it."""
    stock, patched = pair(dtype)
    rows = prompt["attention_mask"].bool()
    one = prompt["input_ids"][:, :1]
    longer = torch.cat((prompt["attention_mask"], torch.ones_like(one)), 1)
    found = []
    for model in (copy.deepcopy(stock).float(), stock, patched):
        output = model(**prompt, use_cache=True)
        after = model(one, attention_mask=longer, **{CACHE: getattr(output, CACHE)}).logits
        found.append((output.logits[rows].float(), after.float()))
    for exact, plain, ours in zip(*found, strict=True):
        assert ((ours - exact).norm() <= 1.2 * (plain - exact).norm()).all()
        assert not ours.isnan().any()


def decoded(model: Any, prompt: dict[str, Tensor], cache: Any, forward: Callable[..., Any]) -> Tensor:
    """Greedy tokens in a loop of our own, as `generate` reads the device. forward: runs all but the prompt."""
    ids, found, begin = prompt["input_ids"], [], 0
    whole = torch.nn.functional.pad(prompt["attention_mask"], (0, LONGEST - ids.shape[1]), value=1)
    positions = (whole.cumsum(1) - 1).clamp(min=0)
    for _ in range(17):
        end = begin + ids.shape[1]
        # A static cache's mask is as long as the cache at every step, or each would be a graph of its own.
        mask = whole if isinstance(cache, StaticCache) else whole[:, :end]
        given = {"attention_mask": mask, "position_ids": positions[:, begin:end], CACHE: cache}
        if BEFORE_5:
            given["cache_position"] = torch.arange(begin, end, device="cuda")
        begin = end
        ids = (forward if found else model)(ids, **given, logits_to_keep=1).logits[:, -1:].argmax(-1)
        found.append(ids.clone())
    return torch.cat(found, 1)


@pytest.mark.filterwarnings("ignore")  # inductor warns of much
@pytest.mark.parametrize("kind", ["default", "offloaded", "static", "static, compiled"])
def test_tokens_are_those_of_transformers(prompt: dict[str, Tensor], kind: str) -> None:
    """Compiled, a step is a CUDA graph with the parameters as static inputs."""
    models = pair(torch.float32)
    found = []
    for model in models:
        if kind.startswith("static"):
            cache: Any = StaticCache(config=model.config, max_cache_len=LONGEST)
        else:
            cache = DynamicCache(config=model.config, offloading=kind == "offloaded")
        found.append(decoded(model, prompt, cache, compiled(model) if kind.endswith("compiled") else model))
    assert torch.equal(*found)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # "a prototype feature", warns its first use
def test_a_decode_step_waits_for_nothing(prompt: dict[str, Tensor]) -> None:
    _, patched = pair(torch.bfloat16)
    cache = getattr(patched(**prompt, use_cache=True), CACHE)
    mask, token = prompt["attention_mask"], prompt["input_ids"][:, :1]
    for step in range(12):  # the cache and the lists of keys grow on the way
        mask = torch.cat((mask, torch.ones_like(token)), 1)
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first may be compiled
        try:
            patched(token, attention_mask=mask, **{CACHE: cache})
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert cache.get_seq_length() == 262
