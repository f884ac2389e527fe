"""What transformers makes of the same prompts, with the same weights on the same device."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastllama.bench.workload import Prompts


def missing(path: Path | None = None) -> str | None:
    """Why transformers cannot run beside us; None where it can. path: of the model that it is to load."""
    if importlib.util.find_spec("transformers") is None:
        return "not installed: pip install 'fastllama[hf]'"
    if path is not None and not (path / "config.json").is_file():
        return "reads Hugging Face folders alone"
    return None


def load(path: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """transformers' model, its weights as they are in the checkpoint, in a dtype."""
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return model.to(device).eval()


def generate(model: Any, prompts: Prompts, tokens: int) -> Prompts:
    """What transformers does with one batch, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    with torch.inference_mode():
        found = model.generate(ids, attention_mask=mask, generation_config=_greedy(model, tokens))
    answers: Prompts = found[:, longest:].tolist()
    return answers


def generate_batch(model: Any, prompts: Prompts, tokens: int) -> Prompts:
    """What transformers does by continuous batching."""
    found = model.generate_batch(inputs=prompts, generation_config=_greedy(model, tokens), progress_bar=False)
    by_prompt = {tuple(output.prompt_ids): list(output.generated_tokens) for output in found.values()}
    return [by_prompt[tuple(prompt)] for prompt in prompts]


PEERS: dict[str, Callable[[Any, Prompts, int], Prompts]] = {"generate": generate, "generate_batch": generate_batch}


def _greedy(model: Any, tokens: int) -> Any:
    import transformers

    nothing = model.config.vocab_size  # ends an answer
    return transformers.GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=nothing, pad_token_id=0)
