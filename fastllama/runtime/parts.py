"""The parts of an LLM: a loaded model, its tokenizer, its sampling settings, and what drafts for it."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastllama.errors import brief
from fastllama.io.adapter import locate
from fastllama.io.companions import find_tokenizer, read_sampling_settings
from fastllama.io.hub import resolve_model
from fastllama.io.load import load_model, resolve_device
from fastllama.io.tokenizer import Tokenizer, load_tokenizer
from fastllama.kernels.compiling import compiling_announced
from fastllama.layers import packing
from fastllama.layers.linear import Linear
from fastllama.layers.model import LlamaForCausalLM
from fastllama.layers.quantization import check_quantization
from fastllama.runtime.drafting.prompt_lookup import PROMPT_LOOKUP
from fastllama.runtime.engine import Engine
from fastllama.runtime.params import SamplingParams

logger = logging.getLogger("fastllama")


class Parts(NamedTuple):
    """What an LLM is made of. sampling_defaults: what generation_config.json sets, by SamplingParams' names."""

    model: LlamaForCausalLM
    tokenizer: Tokenizer | None
    sampling_defaults: dict[str, Any]
    quantization: str | None
    speculation: str | LlamaForCausalLM | None


def load_parts(
    model: str | Path | LlamaForCausalLM,
    *,
    tokenizer: str | Path | Tokenizer | None,
    dtype: str | torch.dtype,
    device: str | torch.device,
    quantization: str | None,
    adapter: str | Path | None,
    speculation: str | Path | LlamaForCausalLM | None,
    progress: bool | None,
) -> Parts:
    """Load what is given by name, and pack the weights; the arguments are LLM's. Raises what LLM raises."""
    check_quantization(quantization)
    if speculation not in (None, PROMPT_LOOKUP) and not isinstance(speculation, LlamaForCausalLM):
        speculation = resolve_model(str(speculation))
    if not isinstance(model, (str, Path, LlamaForCausalLM)):
        raise TypeError(
            f"model is a {type(model).__name__}; legal: 'tiny', a path, a Hub id, or what fastllama.load_model "
            "returns (for a model of transformers: fastllama.patch(model))"
        )
    given = isinstance(model, LlamaForCausalLM)
    settings: dict[str, Any] = {}
    if isinstance(model, LlamaForCausalLM):
        for name, value in (("dtype", dtype), ("device", device)):
            if value != "auto":
                raise ValueError(f"{name} is {value!r} beside a loaded model, which has its own; legal: 'auto'")
        if adapter is not None:
            raise ValueError(f"adapter is {str(adapter)!r} beside a loaded model; legal: load_model(..., adapter=)")
        found, loaded = _tokenizer_of(tokenizer), model
    else:
        target, (path, merged) = resolve_device(device), locate(model, adapter)
        found = _tokenizer_of(tokenizer, *filter(None, (merged, path)))
        settings = _legal_settings(path)
        with announcing(target, progress):
            loaded = load_model(
                path, adapter=merged, dtype=dtype, device=target, quantization=quantization, progress=progress
            )
    if found is not None and found.vocab_size > loaded.config.vocab_size:
        logger.warning(
            "the tokenizer has ids up to %d, the model embeddings up to %d: prompts that need others are refused",
            found.vocab_size - 1,
            loaded.config.vocab_size - 1,
        )
    with announcing(loaded.device, progress):
        if given:
            _pack(loaded, quantization, progress)
        if isinstance(speculation, Path):
            speculation = load_model(
                speculation, dtype=loaded.dtype, device=loaded.device, quantization="auto", progress=progress
            )
    return Parts(loaded, found, settings, packing.kind_of(loaded), speculation)


def announcing(device: torch.device, progress: bool | None) -> AbstractContextManager[None]:
    """Lines on stderr about kernels that are compiled within, unless progress is False."""
    return nullcontext() if progress is False else compiling_announced(device)


def _pack(model: LlamaForCausalLM, quantization: str | None, progress: bool | None) -> None:
    """Pack a model that was given, in place. Raises ValueError where another LLM runs it."""
    kind = packing.resolve(model, quantization, given=True, kept=packing.kind_of(model))
    if kind is not None and Engine.runs(model) and _has_plain_layers(model):
        raise ValueError(
            f"quantization is {kind!r} for a model that another LLM runs, whose weights would change under it; legal: "
            "'auto', a model of its own, or one that was quantized before the first LLM was made"
        )
    packing.apply(model, kind, progress=progress)


def _has_plain_layers(model: LlamaForCausalLM) -> bool:
    """Whether quantization finds anything to do."""
    return any(isinstance(module, Linear) for module in model.modules() if module is not model.lm_head)


def _tokenizer_of(tokenizer: str | Path | Tokenizer | None, *places: Path) -> Tokenizer | None:
    """The tokenizer that is given or lies at a path, else the first that lies with the model."""
    if tokenizer is None or isinstance(tokenizer, Tokenizer):
        return tokenizer or find_tokenizer(*places)
    if not isinstance(tokenizer, (str, Path)):
        raise TypeError(f"tokenizer is {brief(tokenizer)}; legal: a path, fastllama's Tokenizer, or None")
    return load_tokenizer(tokenizer)


def _legal_settings(model: Path) -> dict[str, Any]:
    """The checkpoint's sampling settings, less those that SamplingParams refuses, which are logged."""
    legal = {}
    file, settings = read_sampling_settings(model)
    for name, value in settings.items():
        try:
            SamplingParams.from_dict({name: value})
        except (TypeError, ValueError) as error:
            logger.warning("%s: %s; the setting is ignored", file, error)
        else:
            legal[name] = value
    if legal:
        given = ", ".join(f"{name}={value!r}" for name, value in legal.items())
        logger.info("%s: %s, unless a request brings parameters of its own", file.name, given)
    return legal
