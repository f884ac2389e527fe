"""Runs transformers on the same prompts, with the same weights on the same device."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastllama.arithmetic import ceil_div
from fastllama.bench.workload import SEQUENCES, Prompts
from fastllama.errors import NOT_INSTALLED, counted, why_unusable

OLDER_PAGE = 32  # tokens per block in versions where it is not configurable
STEP = 2048  # tokens per step; its default of 8192 makes a mask of as many rows at every step

# Without psutil, transformers 5.17 assumes 0 bytes of CPU memory; 5.23 works.
WITHOUT_PSUTIL = "; psutil, by which it measures a CPU's memory, is not installed: pip install psutil"


def missing(path: Path | None = None) -> str | None:
    """Why transformers cannot be measured; None where it can. path: of the model to load."""
    why = why_unusable("transformers")
    if why:
        return f"{why}: pip install 'fastllama[hf]'" if why == NOT_INSTALLED else f"cannot be imported: {why}"
    if path is not None and not (path / "config.json").is_file():
        return "reads Hugging Face folders only"
    return None


def load(path: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """transformers' model in a dtype, with the checkpoint's quantization. Hides its progress bar."""
    import transformers
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    finally:
        if shown:
            logging.enable_progress_bar()
    return model.to(device).eval()


def generate(model: Any, prompts: Prompts, tokens: int) -> Prompts:
    """transformers' `generate` on one batch, padded on the left."""
    longest = max(map(len, prompts))
    padded = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    real = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    ids, mask = (torch.tensor(rows, dtype=torch.int64, device=model.device) for rows in (padded, real))
    with torch.inference_mode():
        found = model.generate(ids, attention_mask=mask, generation_config=_greedy(model, tokens))
    answers: Prompts = found[:, longest:].tolist()
    return answers


def generate_batch(model: Any, prompts: Prompts, tokens: int) -> Prompts:
    """transformers' continuous batching, with a cache sized for these prompts.

    Raises RuntimeError where prompts got no answer: its thread logs exceptions, but does not propagate them.
    """
    config, more = _greedy(model, tokens), {}
    if "continuous_batching_config" in inspect.signature(model.generate_batch).parameters:
        more["continuous_batching_config"] = _continuous_batching_config(prompts, tokens)
    else:  # up to 5.3
        config.num_blocks = _num_blocks(prompts, tokens, OLDER_PAGE)
    found = model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False, **more)
    by_prompt = {tuple(output.prompt_ids): list(output.generated_tokens) for output in found.values()}
    missed = sum(tuple(prompt) not in by_prompt for prompt in prompts)
    if missed:
        said = f"{missed} of {counted(len(prompts), 'prompt')} got no answer; see the log of transformers"
        raise RuntimeError(said + (WITHOUT_PSUTIL if why_unusable("psutil") else ""))
    return [by_prompt[tuple(prompt)] for prompt in prompts]


PEERS: dict[str, Callable[[Any, Prompts, int], Prompts]] = {"generate": generate, "generate_batch": generate_batch}


def _greedy(model: Any, tokens: int) -> Any:
    import transformers

    nothing = model.config.vocab_size  # an id that never occurs, so that no answer ends early
    return transformers.GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=nothing, pad_token_id=0)


def _continuous_batching_config(prompts: Prompts, tokens: int) -> Any:
    """The configuration, with sizes for these prompts and answers."""
    import transformers

    config: Any = transformers.ContinuousBatchingConfig(max_batch_tokens=STEP)
    page = config.page_size if hasattr(config, "page_size") else config.block_size  # its name before 5.17
    config.num_blocks = _num_blocks(prompts, tokens, page)
    return config


def _num_blocks(prompts: Prompts, tokens: int, page: int) -> int:
    """Blocks for all concurrent sequences, plus the fifth that its scheduler keeps free.

    By default it allocates most of the memory, and page faults then slow down each call.
    """
    pages = sorted(ceil_div(len(prompt) + tokens, page) for prompt in prompts)[-SEQUENCES:]
    return ceil_div(5 * sum(pages), 4)
