"""Loads the parts of an LLM: model, tokenizer, sampling settings and drafter."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import fastllama
from fastllama.errors import brief
from fastllama.io.adapter import locate
from fastllama.io.companions import find_tokenizer, read_sampling_settings
from fastllama.io.hub import resolve_model
from fastllama.io.load import fill, load_model, meta_model, open_model, resolve_device
from fastllama.io.tokenizer import Tokenizer, as_tokenizer
from fastllama.kernels.compiling import compiling_announced
from fastllama.layers import packing
from fastllama.layers.linear import Linear
from fastllama.layers.model import LlamaForCausalLM
from fastllama.layers.quantization import check_quantization
from fastllama.runtime.device.memory import warn_of_weights
from fastllama.runtime.drafting.prompt_lookup import PROMPT_LOOKUP
from fastllama.runtime.engine import Engine
from fastllama.runtime.params import SamplingParams

logger = logging.getLogger("fastllama")
_MODELS = "'tiny', a path, a Hub id,"
_LOADED = "what fastllama.load_model returns, or a transformers LlamaForCausalLM"


class Parts(NamedTuple):
    """The loaded parts of an LLM.

    name: the user's name for the model. sampling_defaults: from generation_config.json, by SamplingParams' field names.
    """

    model: LlamaForCausalLM
    name: str | None
    tokenizer: Tokenizer | None
    sampling_defaults: dict[str, Any]
    quantization: str | None
    speculation: str | LlamaForCausalLM | None


def load_parts(
    model: str | Path | nn.Module,
    *,
    tokenizer: Any,
    dtype: str | torch.dtype,
    device: str | torch.device,
    quantization: str | None,
    adapter: str | Path | None,
    speculation: str | Path | nn.Module | None,
    progress: bool | None,
) -> Parts:
    """Loads what is given by name and quantizes the weights. The arguments and exceptions are LLM's."""
    check_quantization(quantization)
    if isinstance(speculation, nn.Module):
        speculation = _ours("speculation", speculation, "'prompt_lookup', None, a path, a Hub id,")
    elif speculation not in (None, PROMPT_LOOKUP):
        speculation = resolve_model(str(speculation))
    given = isinstance(model, nn.Module)
    settings: dict[str, Any] = {}
    if isinstance(model, nn.Module):
        for name, value in (("dtype", dtype), ("device", device)):
            if value != "auto":
                raise ValueError(f"{name} is {value!r} beside a loaded model, which has its own; legal: 'auto'")
        if adapter is not None:
            raise ValueError(f"adapter is {str(adapter)!r} beside a loaded model; legal: load_model(..., adapter=)")
        found = _tokenizer_of(tokenizer)
        loaded = _ours("model", model, _MODELS)
        found = loaded.tokenizer if tokenizer is None else found
        called = loaded.name_or_path
        settings = _legal_settings(called or type(model).__name__, loaded.sampling_settings, found)
    elif isinstance(model, (str, Path)):
        target, (path, merged) = resolve_device(device), locate(model, adapter)
        found = _tokenizer_of(tokenizer, *filter(None, (merged, path)))
        called = str(model)
        settings = _legal_settings(*read_sampling_settings(path), found)
        checkpoint, computed = open_model(path, adapter=merged, dtype=dtype)
        built, kind = meta_model(checkpoint, computed, device=target, quantization=quantization)
        warn_of_weights(built.config, computed, kind, target, kept=checkpoint.quantization)
        with announcing(target, progress):
            loaded = fill(built, checkpoint, kind, device=target, progress=progress)
    else:
        raise TypeError(f"model is a {type(model).__name__}; legal: {_MODELS} {_LOADED}")
    if found is not None and found.vocab_size > loaded.config.vocab_size:
        logger.warning(
            "the tokenizer has ids up to %d, the model embeddings up to %d: prompts with larger ids are rejected",
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
    return Parts(loaded, called, found, settings, packing.kind_of(loaded), speculation)


def announcing(device: torch.device, progress: bool | None) -> AbstractContextManager[None]:
    """Returns a context manager that reports kernel compilation on stderr, unless progress is False."""
    return nullcontext() if progress is False else compiling_announced(device)


def _pack(model: LlamaForCausalLM, quantization: str | None, progress: bool | None) -> None:
    """Quantizes a given model in place. Raises ValueError if another LLM runs it."""
    kind = packing.resolve(model, quantization, given=True, kept=packing.kind_of(model))
    if kind is not None and Engine.runs(model) and _has_plain_layers(model):
        raise ValueError(
            f"quantization is {kind!r} for a model that another LLM runs, whose weights would change under it; legal: "
            "'auto', a model of its own, or one that was quantized before the first LLM was made"
        )
    packing.apply(model, kind, progress=progress)


def _has_plain_layers(model: LlamaForCausalLM) -> bool:
    """Whether the model has layers left to quantize."""
    return any(isinstance(module, Linear) for module in model.modules() if module is not model.lm_head)


def _ours(argument: str, model: nn.Module, others: str) -> LlamaForCausalLM:
    """Returns the model, or a LlamaForCausalLM over the weights of a transformers model. others: other legal values."""
    if isinstance(model, LlamaForCausalLM):
        return model
    if not any(each.__module__.startswith("transformers.") for each in type(model).__mro__):
        raise TypeError(f"{argument} is a {type(model).__name__}; legal: {others} {_LOADED}")
    return fastllama.from_transformers(model)  # by its public name: the runtime imports no integration


def _tokenizer_of(tokenizer: Any, *places: Path) -> Tokenizer | None:
    """Returns the given tokenizer, else the first one found in these places."""
    return find_tokenizer(*places) if tokenizer is None else as_tokenizer(tokenizer)


def _legal_settings(source: str | Path, settings: Mapping[str, Any], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Returns the model's sampling settings that requests can use; logs the ignored ones. source: where they come from.

    SamplingParams rejects some, and stop strings need a tokenizer.
    """
    legal = {}
    for name, value in settings.items():
        if name == "stop" and tokenizer is None:
            logger.warning(
                "%s: stop is %s, which needs a tokenizer, and there is none; the setting is ignored",
                source,
                brief(value),
            )
            continue
        try:
            SamplingParams.from_dict({name: value})
        except (TypeError, ValueError) as error:
            logger.warning("%s: %s; the setting is ignored", source, error)
        else:
            legal[name] = value
    if legal:
        given = ", ".join(f"{name}={value!r}" for name, value in legal.items())
        shown = source.name if isinstance(source, Path) else source
        logger.info("%s: %s, unless a request has its own sampling parameters", shown, given)
    return legal
