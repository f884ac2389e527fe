"""The complete parity check: weights, ops, layers, logits, tokens."""

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
    """Compare every op, layer, logit and token of a model on a device with explicit fp64 formulas.

    model, tokenizer, dtype, device, progress: as for LLM. A bound is twice the error of plain torch in the same dtype,
    measured in the same run, plus one rounding. Extra memory: one weight matrix in fp64 and the activations of 128
    tokens. A model with quantized weights is compared with its dequantized weights.
    against: "transformers" compares layers, logits and tokens with the transformers library in the same dtype, which
    also finds misreadings of config.json, which the formulas share with the layers. The bounds are more than twice as
    wide, as both round; memory holds a second copy of the model.
    Raises the errors of LLM, and ValueError for a model that rounds activations, too (w8a8), or that transformers
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
    """Raise ValueError where activations are rounded: the error of a correct implementation has no small bound then."""
    if "w8a8" in kinds:
        raise ValueError(
            f"model is {str(model)!r}, which has layers in w8a8: these round their input to 8 bits, and the reference "
            "formulas do not; legal: weights in int4 or int8, or not quantized"
        )
