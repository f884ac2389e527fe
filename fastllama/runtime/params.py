"""The sampling and stopping parameters of a request."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections import abc
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastllama.arithmetic import FP32_SMALLEST, within_fp32
from fastllama.errors import brief, reject_unknown
from fastllama.runtime import values
from fastllama.runtime.peer_names import peer_hint
from fastllama.runtime.values import INT64_LARGEST, LogitsProcessor

MAX_LOGPROBS = 20  # what OpenAI's chat API allows; each one is copied to the host for every token
# Least and largest legal value; None is no limit.
_INTEGERS: dict[str, tuple[int, int | None]] = {
    "n": (1, None),
    "max_tokens": (1, None),
    "min_tokens": (0, INT64_LARGEST),
    "top_k": (-1, INT64_LARGEST),
    "seed": (0, INT64_LARGEST),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
    "truncate_prompt_tokens": (-1, None),
}
_REALS: dict[str, tuple[float, float | None]] = {
    "temperature": (0, None),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0, None),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
}
_WITH_IDS = ("logit_bias", "allowed_token_ids", "stop_token_ids")
_POSITIVE = ("top_p", "repetition_penalty")
_FLAGS = ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The sampling and stopping parameters of one request. None selects a field's default, except for max_tokens.

    n: number of samples of the prompt.
    max_tokens: most generated tokens of each sample; None generates to the end of the context.
    min_tokens: before this many generated tokens, neither EOS nor a stop token is sampled, and no stop string ends a
    sample.
    temperature: divides the logits; 0 takes the likeliest token.
    top_k: samples only from this many likeliest tokens; 0 and -1 keep all.
    top_p: samples only from the likeliest tokens of this probability mass (nucleus sampling, Holtzman et al. 2020).
    min_p: least probability, relative to the likeliest token's, that can be sampled (Nguyen et al. 2024).
    repetition_penalty: divides positive, multiplies negative logits of seen tokens (Keskar et al. 2019); 1 is off.
    presence_penalty, frequency_penalty: subtracted from a generated token's logit once, or once per occurrence.
    logit_bias: token id -> number added to its logit; -inf bans the token.
    allowed_token_ids: the only tokens that can be sampled; None allows all.
    bad_words: strings whose token sequences are not generated, with and without a leading space.
    logits_processors: callables (generated token ids: list[int], logits: Tensor [V] fp32) -> Tensor [V], called in
    order once per token, and again only where a step is rerun because another request failed. They need each token on
    the host before the next step, so such requests use no CUDA graph, no step launched ahead and no draft tokens.
    seed: makes the request's samples reproducible; bit-identical in any batch only with LLM(deterministic=True).
    Requests of the same seed and prompt sample the same tokens. None: chosen, and reported by RequestOutput.seed.
    stop: strings that end a sample and are cut from its text, unless include_stop_str_in_output.
    stop_token_ids: tokens that end a sample, as EOS does unless ignore_eos. They are left out of the text.
    logprobs, prompt_logprobs: how many of the likeliest tokens to report beside the actual one; None reports nothing.
    Log-probabilities are the model's own, before temperature, penalties, biases and bans.
    truncate_prompt_tokens: keeps this many tokens of the prompt's end; -1 keeps as many as leave room in max_model_len
    for max_tokens, or for one token where that is None. None keeps all.

    Numbers may be NumPy scalars or 0-d tensors, and sequences of token ids arrays or tensors. temperature, top_p and
    min_p are clamped to fp32's range; no other value is changed. Raises TypeError for wrong types and unknown names,
    ValueError for illegal values.
    """

    n: int = 1
    max_tokens: int | None = 256
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    allowed_token_ids: abc.Sequence[int] | None = None
    bad_words: str | abc.Sequence[str] = ()
    logits_processors: abc.Sequence[LogitsProcessor] = field(default=(), hash=False)
    seed: int | None = None
    stop: str | abc.Sequence[str] = ()
    stop_token_ids: abc.Sequence[int] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    skip_special_tokens: bool = True

    def __new__(cls, *_: Any, **options: Any) -> SamplingParams:
        """Rejects unknown names with a hint; __init__ would raise Python's bare TypeError."""
        legal = cls.__dataclass_fields__
        if not options.keys() <= legal.keys():
            reject_unknown(cls.__name__, (name for name in options if name not in legal), legal, peer_hint)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        put = functools.partial(object.__setattr__, self)
        for each in dataclasses.fields(self):
            if getattr(self, each.name) is None and each.name != "max_tokens":
                put(each.name, each.default)
        for name, limits in _INTEGERS.items():
            if (value := getattr(self, name)) is not None:
                put(name, values.integer(name, value, *limits))
        for name, bounds in _REALS.items():
            put(name, values.real(name, getattr(self, name), *bounds))
        for name in _POSITIVE:
            if getattr(self, name) == 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}; legal: above 0")
        for name in _FLAGS:
            put(name, values.flag(name, getattr(self, name)))
        put("top_k", max(self.top_k, 0))
        values.check_fp32("repetition_penalty", self.repetition_penalty, FP32_SMALLEST)
        if self.truncate_prompt_tokens == 0:
            raise ValueError("truncate_prompt_tokens is 0; legal: -1, or at least 1")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens}; legal: at most max_tokens, {brief(self.max_tokens)}")
        # Copies, so that a caller's later change of a list or dict does not change a running request.
        put("stop", values.strings("stop", self.stop))
        put("bad_words", values.strings("bad_words", self.bad_words))
        put("stop_token_ids", values.token_ids("stop_token_ids", self.stop_token_ids))
        put("logits_processors", values.processors("logits_processors", self.logits_processors))
        if self.allowed_token_ids is not None:
            put("allowed_token_ids", values.token_ids("allowed_token_ids", self.allowed_token_ids))
            if not self.allowed_token_ids:
                raise ValueError("allowed_token_ids is empty; legal: at least one token id, or None for all tokens")
        if self.logit_bias is not None:
            put("logit_bias", values.token_biases("logit_bias", self.logit_bias))

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> SamplingParams:
        """Makes parameters from JSON options: null selects a field's default, logit_bias may have keys such as "7".

        logprobs may be true or false, as in OpenAI's chat API, with their number in top_logprobs. An unknown name
        raises TypeError, which names the equivalent here, if there is one, and the legal names.
        """
        if not isinstance(options, Mapping):
            raise TypeError(f"options is {brief(options)}; legal: a mapping of SamplingParams' fields to their values")
        for name in options:
            if not isinstance(name, str):
                raise TypeError(f"options has a name {brief(name)} of type {type(name).__name__}; legal: strings")
        options = dict(options)
        if options.get("top_logprobs", 0) is None:
            del options["top_logprobs"]
        if isinstance(asked := options.get("logprobs"), bool):
            top = values.integer("top_logprobs", options.pop("top_logprobs", 0), 0, MAX_LOGPROBS)
            if top and not asked:
                raise ValueError(f"top_logprobs is {top} beside logprobs=False; legal: beside logprobs=True")
            options["logprobs"] = top if asked else None
        if isinstance(biases := options.get("logit_bias"), Mapping):
            options["logit_bias"] = {values.token_id_of_key(key): bias for key, bias in biases.items()}
        return cls(**options)

    def __repr__(self) -> str:
        fields = (f"{name}={brief(getattr(self, name))}" for name in self.__dataclass_fields__)
        return f"{type(self).__name__}({', '.join(fields)})"

    @functools.cached_property
    def in_fp32(self) -> tuple[float, float, float]:
        """temperature, top_p and min_p as the device takes them, clamped to the range of fp32."""
        return within_fp32(self.temperature), within_fp32(self.top_p), within_fp32(self.min_p)

    @functools.cached_property
    def allowed(self) -> frozenset[int] | None:
        """allowed_token_ids as a set; None for all tokens."""
        return None if self.allowed_token_ids is None else frozenset(self.allowed_token_ids)

    @functools.cached_property
    def largest_ids(self) -> dict[str, int]:
        """The largest token id in each field that contains token ids; empty fields are left out."""
        return {name: max(ids) for name in _WITH_IDS if (ids := getattr(self, name))}

    def changed(self, **fields: Any) -> SamplingParams:
        """Returns a copy with other values in some fields, unchecked: each must be as the constructor stores it.

        The copy shares large fields and the values cached from them.
        """
        changed = copy.copy(self)
        held = vars(changed)
        for name in [name for name in held if name not in self.__dataclass_fields__]:
            del held[name]  # cached from the old values
        if "allowed_token_ids" not in fields:
            held["allowed"] = self.allowed
        if fields.keys().isdisjoint(_WITH_IDS):
            held["largest_ids"] = self.largest_ids
        held.update(fields)
        return changed

    @property
    def penalizes(self) -> bool:
        """Whether the logits depend on earlier tokens through a penalty."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @functools.cached_property
    def adjusts(self) -> bool:
        """Whether penalties, biases or bans change the logits before sampling."""
        bans = self.allowed_token_ids is not None or self.min_tokens > 0 or bool(self.bad_words)
        return self.penalizes or bool(self.logit_bias) or bans

    @property
    def host_bound(self) -> bool:
        """Whether sampling needs the earlier tokens on the host: logits processors and bad words read them."""
        return bool(self.logits_processors or self.bad_words)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always chosen."""
        return self.temperature == 0
