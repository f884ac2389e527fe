"""The whole check: weights, ops, layers, logits, tokens."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

import torch

from fastllama.errors import check_choice
from fastllama.io.load import open_model, resolve_device
from fastllama.layers.quantized import QuantizedLinear
from fastllama.runtime.llm import LLM
from fastllama.verify import model as whole
from fastllama.verify import ops
from fastllama.verify.hugging_face import TransformersReference
from fastllama.verify.report import FORMULAS, Report

REFERENCES = ("formulas", "transformers")


def check(
    model: str | Path = "tiny",
    *,
    tokenizer: str | Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    against: str = "formulas",
    progress: bool | None = None,
) -> Report:
    """Compare every op, layer, logit and token of a model on a device with explicit formulas in fp64.

    model, tokenizer, dtype, device, progress: as for LLM. A bound is twice the error of plain torch in the same dtype,
    measured in the same run, and one rounding. Memory beyond the model: one weight matrix in fp64 and the activations
    of 128 tokens. A model whose weights are quantized is judged by what these stand for.
    against: "transformers" compares layers, logits and tokens with the transformers library in the same dtype, which
    also finds what we misread in config.json: the formulas read it as the layers do. The bounds are more
    than twice as wide, as both round; memory holds a second copy of the model.
    Raises what LLM raises, and ValueError for a model that rounds what it multiplies, too (w8a8), or that transformers
    cannot open; ExtraRequiredError where transformers is missing.
    """
    start = time.perf_counter()
    check_choice("against", against, REFERENCES)
    checkpoint, target = open_model(model, dtype=dtype)
    _check_kinds(model, [checkpoint.quantization])
    theirs = None
    if against == "transformers":  # before our own model, so that a refusal takes seconds
        theirs = TransformersReference(model, checkpoint, target, resolve_device(device))
    total = sum(whole.lengths(checkpoint.config))
    with LLM(
        model,
        tokenizer=tokenizer,
        dtype=dtype,
        device=device,
        max_model_len=total,
        kv_cache_tokens=total,
        max_num_seqs=1,
        max_num_batched_tokens=whole.CHUNK,
        progress=progress,
    ) as llm:
        built = llm.engine.model
        _check_kinds(model, [module.kind for module in built.modules() if isinstance(module, QuantizedLinear)])
        with torch.inference_mode():
            found = [*ops.rows(built.dtype, built.device), whole.weight_row(llm, checkpoint)]
        found += whole.rows(llm, theirs, progress=progress)
    return Report(
        model=str(model),
        dtype=str(built.dtype).removeprefix("torch."),
        device=str(built.device),
        reference=FORMULAS if theirs is None else theirs.name,
        seconds=time.perf_counter() - start,
        rows=tuple(found),
    )


def _check_kinds(model: str | Path, kinds: Iterable[str | None]) -> None:
    """Raises ValueError where activations are rounded: there the error of honest arithmetic has no small bound."""
    if "w8a8" in kinds:
        raise ValueError(
            f"model is {str(model)!r}, which has layers in w8a8: these round their input to 8 bits, and the formulas "
            "that judge it do not; legal: weights in int4 or int8, or not quantized"
        )
