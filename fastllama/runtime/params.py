"""How the tokens of a request are drawn and where they end."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections import abc
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastllama.arithmetic import within_fp32
from fastllama.errors import check_range, reject_unknown

MAX_LOGPROBS = 20  # what OpenAI's chat API allows; each one is copied to the host for every token


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling and stopping of one request. Wrong types raise TypeError, illegal values ValueError.

    n: samples of one prompt.
    max_tokens: generated tokens of each sample.
    temperature: divides the logits; 0 takes the likeliest token.
    top_k: how many of the likeliest tokens may be drawn; 0 is all.
    top_p: probability mass of the likeliest tokens that may be drawn (nucleus sampling, Holtzman et al. 2020).
    min_p: least probability, relative to the likeliest token's, that may be drawn (Nguyen et al. 2024).
    repetition_penalty: divides positive, multiplies negative logits of seen tokens (Keskar et al. 2019); 1 is off.
    presence_penalty, frequency_penalty: subtracted from a generated token's logit once, or once per occurrence.
    logit_bias: token id -> number added to its logit.
    seed: makes the draws of this request reproducible.
    stop: strings that end a sample and are cut from its text.
    stop_token_ids: tokens that end a sample, as EOS does unless ignore_eos.
    logprobs, prompt_logprobs: how many of the likeliest tokens to report beside the actual one; None reports nothing.
    """

    n: int = 1
    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: str | abc.Sequence[str] = ()
    stop_token_ids: abc.Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        _check_integer("n", self.n, 1)
        _check_integer("max_tokens", self.max_tokens, 1)
        _check_real("temperature", self.temperature, 0)
        _check_integer("top_k", self.top_k, 0)
        _check_real("top_p", self.top_p, 0, 1)
        _check_positive("top_p", self.top_p)
        _check_real("min_p", self.min_p, 0, 1)
        _check_real("repetition_penalty", self.repetition_penalty, 0)
        _check_positive("repetition_penalty", self.repetition_penalty)
        _check_real("presence_penalty", self.presence_penalty, -2, 2)
        _check_real("frequency_penalty", self.frequency_penalty, -2, 2)
        if self.seed is not None:
            _check_integer("seed", self.seed, 0, 2**63 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if (count := getattr(self, name)) is not None:
                _check_integer(name, count, 0, MAX_LOGPROBS)
        for name in ("ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        # Own copies: a caller who later changes his list or dict must not change a running request.
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _biases(self.logit_bias))

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> SamplingParams:
        """From named options (JSON, command line). An unknown name raises TypeError with the nearest legal one."""
        legal = [field.name for field in dataclasses.fields(cls)]
        reject_unknown(cls.__name__, (name for name in options if name not in legal), legal)
        return cls(**options)

    @functools.cached_property
    def in_fp32(self) -> tuple[float, float, float]:
        """temperature, top_p and min_p as a device takes them: what is beyond fp32 is the nearest number within."""
        return within_fp32(self.temperature), within_fp32(self.top_p), within_fp32(self.min_p)

    @property
    def penalizes(self) -> bool:
        """Whether draws depend on the tokens before them beyond the model's logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0


def _check_integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}")
    check_range(name, value, low, high)


def _check_real(name: str, value: Any, low: float, high: float | None = None) -> None:
    check_range(name, value, low, high)
    if abs(value) > sys.float_info.max:
        raise ValueError(f"{name} is {value!r}; legal: a finite number")


def _check_positive(name: str, value: float) -> None:
    if value == 0:
        raise ValueError(f"{name} is {value!r}; legal: above 0")


def _stop_strings(stop: Any) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else _elements("stop", stop, "a string or strings")
    for string in strings:
        if not isinstance(string, str):
            raise TypeError(f"stop must be a string or strings, got {string!r} of type {type(string).__name__}")
        if not string:
            raise ValueError(f"stop is {stop!r}; legal: strings of at least one character")
    return strings


def _token_ids(name: str, ids: Any) -> tuple[int, ...]:
    elements = _elements(name, ids, "token ids")
    for token_id in elements:
        _check_integer(f"a token id in {name}", token_id, 0)
    return elements


def _biases(biases: Any) -> dict[int, float]:
    if not isinstance(biases, Mapping):
        raise TypeError(f"logit_bias must map token ids to numbers, got {biases!r} of type {type(biases).__name__}")
    _token_ids("logit_bias", biases)
    for token_id, bias in biases.items():
        _check_real(f"logit_bias[{token_id}]", bias, -math.inf)
    return dict(biases)


def _elements(name: str, values: Any, what: str) -> tuple[Any, ...]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be {what}, got {values!r} of type {type(values).__name__}")
    return tuple(values)
