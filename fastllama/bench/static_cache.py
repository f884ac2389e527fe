"""transformers' fastest decoding: StaticCache and torch.compile, whose steps are CUDA graphs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastllama.layers.config import LlamaConfig

NAME = "transformers StaticCache, compiled"
DTYPE = torch.bfloat16
PREFILLED = 4096  # tokens per prefill pass, to bound its activations


def load(config: LlamaConfig, device: torch.device) -> Any:
    """transformers' model of the same shape, with random weights in DTYPE."""
    import transformers

    with torch.device(device):
        made = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**config.to_hf()), dtype=DTYPE)
    return made.eval()


def compiled(model: Any) -> Callable[..., Any]:
    """Its forward pass, compiled as in transformers' documentation; earlier compilations are dropped."""
    torch.compiler.reset()
    forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)

    def call(*args: Any, **options: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # allows the previous results to be overwritten
        return forward(*args, **options)

    return call


@torch.no_grad()
def decoder(model: Any, forward: Callable[..., Any], prompts: list[list[int]], context: int) -> Callable[[], object]:
    """A step that decodes the next token of every prompt greedily, and copies it to the host.

    forward: of the model, compiled or not. The prompts, all of one length, are prefilled here, uncompiled.
    """
    import transformers

    ids = torch.tensor(prompts, dtype=torch.int64, device=model.device)
    cache = transformers.StaticCache(config=model.config, max_cache_len=context)
    legacy = "cache_position" in inspect.signature(model.forward).parameters  # in transformers 4; later caches count

    def arguments(first: int, end: int) -> dict[str, Any]:
        positions = torch.arange(first, end, dtype=torch.int64, device=model.device)
        return {"past_key_values": cache, **({"cache_position": positions} if legacy else {})}

    length = 0
    for some in ids.split(max(PREFILLED // len(prompts), 1), dim=1):
        logits = model(some, logits_to_keep=1, **arguments(length, length + some.shape[1])).logits
        length += some.shape[1]
    token: Tensor = logits[:, -1].argmax(-1, keepdim=True)

    @torch.no_grad()
    def step() -> list[list[int]]:
        nonlocal token, length
        token = forward(token, **arguments(length, length + 1)).logits[:, -1].argmax(-1, keepdim=True)
        length += 1
        read: list[list[int]] = token.tolist()
        return read

    return step
