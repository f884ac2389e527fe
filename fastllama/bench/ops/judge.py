"""Checks results before they are timed: the error against the fp64 reference, bounded by plain torch's own error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastllama.bench.ops.formulas import Function
from fastllama.catalogue import arguments
from fastllama.catalogue.llama_calls import LlamaCall
from fastllama.catalogue.maker import Arguments
from fastllama.kernels import reference
from fastllama.runtime.device.memory import available_bytes
from fastllama.testing import bounds
from fastllama.testing.bounds import error

JUDGED_PROMPT = 2048  # tokens: their scores in fp64 take 1 GiB for a 7B, and 64 times that for eight times the prompt
JUDGE_BYTES = 40  # most memory per byte of the call: fp64 is four times bf16, and formulas have temporaries


def judged(case: LlamaCall, function: Function, device: torch.device) -> tuple[float, float]:
    """The error of function(call) against the fp64 reference, and its bound by plain torch's own error.

    As in docs/design/numerics.md: relative to the largest value of a row, and at most twice plain torch's.
    """
    rows = min(case.rows, JUDGED_PROMPT) if case.op in ("attention_varlen", "attention_prefill") else case.rows
    if case.kv_bytes:  # before anything is allocated
        rows = min(rows, max(available_bytes(device) * rows // (JUDGE_BYTES * case.kv_bytes), 1))
    call = case.make(device, seed=0, rows=rows)
    share = available_bytes(device) / (JUDGE_BYTES * max(case.bytes(call), 1))  # 0 bytes of no rows
    if share < 1:
        call = case.make(device, seed=0, rows=max(int(share * rows), 1))
    return judge(case.op, function, call)


def copied(inputs: Arguments, dtype: torch.dtype | None = None) -> Arguments:
    """Arguments copied to new memory, floating tensors in another dtype if one is given."""

    def own(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(dtype, copy=True) if dtype and value.is_floating_point() else value.clone()

    return {name: own(value) for name, value in inputs.items()}


def written(inputs: Arguments, results: Any) -> list[Tensor]:
    """An op's results: the returned tensors, dequantized, and the pages that it wrote."""
    returned = list(results) if isinstance(results, tuple) else [] if results is None else [results]
    if returned and returned[0].dtype == torch.int8:
        codes, scales = returned
        returned = [codes * scales[..., None]]
    return [*returned, *(inputs[name] for name in ("k_pages", "v_pages") if name in inputs and "slots" in inputs)]


def _plain(op: str, inputs: Arguments) -> list[Tensor]:
    """The reference's results, computed in the inputs' dtype."""
    given = arguments.inputs(op, inputs)
    results = getattr(reference, op)(**given)
    return written(given, results[0] if op.startswith("attention") else results)


def judge(op: str, function: Callable[[Arguments], Any], inputs: Arguments) -> tuple[float, float]:
    """The error of function(inputs) and its bound, of its worst result, as in docs/design/numerics.md."""
    if op == "sample":
        return _judge_sample(function, inputs)
    exact = _plain(op, copied(inputs, torch.float64))
    plain = _plain(op, copied(inputs))
    own = copied(inputs)
    pairs = list(zip(written(own, function(own)), plain, exact, strict=True))
    found = [(error(ours, best), bound(theirs, best)) for ours, theirs, best in pairs]
    return max(found, key=lambda each: (each[0] > each[1], each[0]))


def _judge_sample(function: Callable[[Arguments], Any], inputs: Arguments) -> tuple[float, float]:
    """The error of the log-probabilities and its bound; or the share of excluded tokens and 0.02, where it is larger.

    The choice among legal tokens is not compared: peers use other random numbers.
    """
    tokens, logprobs = function(copied(inputs))
    values = inputs["logits"].double()
    exact = values.log_softmax(-1).gather(1, tokens[:, None])
    scaled = (values / inputs["temperature"][:, None]).softmax(-1)
    legal = reference.sampling.filter_probs(scaled, *(inputs[name] for name in ("top_k", "top_p", "min_p")))
    illegal = (legal.gather(1, tokens[:, None]) == 0).double().mean()
    if illegal > 0.02:  # a row may cross a filter's edge by rounding, but not a fiftieth of all rows
        return float(illegal), 0.02
    if logprobs is None:
        return 0.0, 0.0
    plain = inputs["logits"].float().log_softmax(-1).gather(1, tokens[:, None])
    # Relative to the largest of all: each is a difference of logits, whose rounding does not shrink with it.
    return error(logprobs[None], exact.T), bound(plain.T, exact.T)


def bound(plain: Tensor, exact: Tensor) -> float:
    """The legal error, from that of plain torch."""
    return bounds.bound(error(plain, exact), plain.dtype)
