"""Whether what is timed is right: its error against the fp64 reference beside what plain torch's own error allows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops.inputs import Inputs
from fastllama.kernels import reference
from fastllama.testing.bounds import error

OUTPUTS = (
    "out",
    "residual_out",
    "q_out",
    "k_out",
    "tokens",
    "logprobs",
    "lse_out",
    "scales_out",
    "workspace",
)  # may be left out


def copied(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    """Inputs of their own memory, floating tensors in another dtype if one is given."""

    def own(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(dtype, copy=True) if dtype and value.is_floating_point() else value.clone()

    return {name: own(value) for name, value in inputs.items()}


def written(inputs: Inputs, results: Any) -> list[Tensor]:
    """What an op gave: the tensors it returned, codes as what they stand for, and the pages it wrote."""
    returned = list(results) if isinstance(results, tuple) else [results]
    if returned[0].dtype == torch.int8:
        codes, scales = returned
        returned = [codes * scales[..., None]]
    return [*returned, *(inputs[name] for name in ("k_pages", "v_pages") if "slots" in inputs)]


def _plain(op: str, inputs: Inputs) -> list[Tensor]:
    """The reference's results, computed in the inputs' dtype."""
    given = {name: value for name, value in inputs.items() if name not in OUTPUTS}
    if op.startswith("attention"):
        given["scale"] = 1 / math.sqrt(inputs["q"].shape[-1])
        if "page_table" in given:
            given |= {name: given.get(name) for name in ("k_scales", "v_scales")}
    results = getattr(reference, op)(**given)
    return written(given, results[0] if op.startswith("attention") else results)


def judge(op: str, function: Callable[[Inputs], Any], inputs: Inputs) -> tuple[float, float]:
    """The error of function(inputs) and its bound, as in docs/numerics.md: that of the worst of its results."""
    if op == "sample":
        return _judge_sample(function, inputs)
    exact = _plain(op, copied(inputs, torch.float64))
    plain = _plain(op, copied(inputs))
    own = copied(inputs)
    pairs = list(zip(written(own, function(own)), plain, exact, strict=True))
    found = [(error(ours, best), bound(theirs, best)) for ours, theirs, best in pairs]
    return max(found, key=lambda each: (each[0] > each[1], each[0]))


def _judge_sample(function: Callable[[Inputs], Any], inputs: Inputs) -> tuple[float, float]:
    """The mass of the rows whose token the filters exclude, and the error of the log-probabilities.

    Which of the legal tokens is drawn is not compared: peers draw other random numbers.
    """
    tokens, logprobs = function(copied(inputs))
    values = inputs["logits"].double()
    exact = values.log_softmax(-1).gather(1, tokens[:, None])
    scaled = (values / inputs["temperature"][:, None]).softmax(-1)
    legal = reference.sampling.filter_probs(scaled, *(inputs[name] for name in ("top_k", "top_p", "min_p")))
    illegal = (legal.gather(1, tokens[:, None]) == 0).double().mean()
    if illegal > 0.02:  # a row may end beside the filter's edge by rounding, a fiftieth of them not
        return float(illegal), 0.02
    if logprobs is None:
        return 0.0, 0.0
    plain = inputs["logits"].float().log_softmax(-1).gather(1, tokens[:, None])
    # Relative to the largest of all: each is a difference of logits, whose rounding does not shrink with it.
    return error(logprobs[None], exact.T), bound(plain.T, exact.T)


def bound(plain: Tensor, exact: Tensor) -> float:
    """The error that plain torch's own result allows: see fastllama.testing.bounds."""
    return 2 * error(plain, exact) + torch.finfo(plain.dtype).eps / 2
