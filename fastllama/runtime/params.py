"""How the tokens of a request are drawn and where they end."""

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
    """Sampling and stopping of one request. None is a field's default, but for max_tokens.

    n: samples of one prompt.
    max_tokens: generated tokens of each sample; None is to the end of the context.
    min_tokens: generated tokens before which neither EOS nor a stop token can be sampled, nor a stop string ends.
    temperature: divides the logits; 0 takes the likeliest token.
    top_k: how many of the likeliest tokens may be drawn; 0 and -1 are all.
    top_p: probability mass of the likeliest tokens that may be drawn (nucleus sampling, Holtzman et al. 2020).
    min_p: least probability, relative to the likeliest token's, that may be drawn (Nguyen et al. 2024).
    repetition_penalty: divides positive, multiplies negative logits of seen tokens (Keskar et al. 2019); 1 is off.
    presence_penalty, frequency_penalty: subtracted from a generated token's logit once, or once per occurrence.
    logit_bias: token id -> number added to its logit; -inf bans the token.
    allowed_token_ids: the only tokens that may be sampled; None is all.
    bad_words: strings that are not generated as the tokens which they encode to, with and without a space in front.
    logits_processors: callables (generated token ids: list[int], logits: Tensor [V] fp32) -> Tensor [V], called in
    turn for each token, a second time only where a step is run again for a neighbour's fault. They need each token on
    the host before the next: such requests leave the captured step, do not run ahead, and get no drafts.
    seed: makes the draws of this request reproducible: bit for bit in any company only with LLM(deterministic=True).
    Two requests of one seed and one prompt draw the same. None: one that RequestOutput.seed reports.
    stop: strings that end a sample and are cut from its text, unless include_stop_str_in_output.
    stop_token_ids: tokens that end a sample, as EOS does unless ignore_eos. They show no text.
    logprobs, prompt_logprobs: how many of the likeliest tokens to report beside the actual one; None reports nothing.
    Log-probabilities are the model's own, before temperature, penalties, biases and bans.
    truncate_prompt_tokens: keeps so many tokens of the prompt's end; -1 as many as leave room in max_model_len for
    max_tokens, or for one token where that is None. None keeps all.

    A number may be NumPy's or a 0-d tensor, a sequence of token ids an array or a tensor. temperature, top_p and min_p
    beyond fp32 are the nearest number that it holds; nothing else is rounded to another magnitude. Wrong types and
    unknown names raise TypeError, illegal values ValueError.
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
        """Refuses unknown names with a hint, where __init__ would have Python's bare TypeError."""
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
        # Own copies: a caller who later changes his list or dict must not change a running request.
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
        """From named options as JSON writes them: null is a field's default, logit_bias may have keys such as "7".

        logprobs may be true or false, as in OpenAI's chat API, with their number in top_logprobs.
        An unknown name raises TypeError with its name here, if there is one, and the legal ones.
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
        """temperature, top_p and min_p as a device takes them: what is beyond fp32 is the nearest number within."""
        return within_fp32(self.temperature), within_fp32(self.top_p), within_fp32(self.min_p)

    @functools.cached_property
    def allowed(self) -> frozenset[int] | None:
        """allowed_token_ids as a set; None for all tokens."""
        return None if self.allowed_token_ids is None else frozenset(self.allowed_token_ids)

    @functools.cached_property
    def largest_ids(self) -> dict[str, int]:
        """Of each field that names token ids, if it names any, the largest."""
        return {name: max(ids) for name in _WITH_IDS if (ids := getattr(self, name))}

    def changed(self, **fields: Any) -> SamplingParams:
        """A copy with other values in some fields, each as the constructor holds it: they are not checked.

        It shares the large fields, and what was computed of them.
        """
        changed = copy.copy(self)
        held = vars(changed)
        for name in [name for name in held if name not in self.__dataclass_fields__]:
            del held[name]  # what was computed of the old values
        if "allowed_token_ids" not in fields:
            held["allowed"] = self.allowed
        if fields.keys().isdisjoint(_WITH_IDS):
            held["largest_ids"] = self.largest_ids
        held.update(fields)
        return changed

    @property
    def penalizes(self) -> bool:
        """Whether draws depend on the tokens before them beyond the model's logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @functools.cached_property
    def adjusts(self) -> bool:
        """Whether logits are changed by penalties, biases or bans before they are sampled from."""
        bans = self.allowed_token_ids is not None or self.min_tokens > 0 or bool(self.bad_words)
        return self.penalizes or bool(self.logit_bias) or bans

    @property
    def host_bound(self) -> bool:
        """Whether sampling a token needs those before it on the host: logits processors and bad words read them."""
        return bool(self.logits_processors or self.bad_words)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0
