"""Translates a request's JSON into a job: checks its fields, and makes prompts and sampling parameters."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from fastllama.errors import brief, check_range
from fastllama.runtime.params import SamplingParams
from fastllama.serve.chat import check_fits, check_length, encode_messages
from fastllama.serve.decoding import decode
from fastllama.serve.errors import ApiError, invalid
from fastllama.serve.jobs import Job, PromptIds
from fastllama.serve.model import ServedModel
from fastllama.serve.wire import (
    ChatRequest,
    CommonRequest,
    CompletionRequest,
    DetokenizeAnswer,
    DetokenizeRequest,
    TokenizeAnswer,
    TokenizeRequest,
)

MAX_PROMPTS = 128  # of one request
MAX_STOPS, MAX_STOP_LENGTH = 16, 1000  # stop strings; characters of each, which take 300 bytes apiece during the search
MAX_TOKEN_RULES = 1024  # entries of logit_bias and of stop_token_ids
COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for completions
# Passed on unchanged, unless null
_SAMPLING = (
    "n",
    "min_tokens",
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "top_k",
    "min_p",
    "repetition_penalty",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "skip_special_tokens",
)
# OpenAI's behaviour without the field, which is this server's too
_DEFAULTS: Mapping[str, tuple[Any, ...]] = {
    "store": (False,),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "reasoning_effort": ("none", "medium"),
    "verbosity": ("medium",),
}
_UNSUPPORTED = (
    "audio",
    "prediction",
    "web_search_options",
    "functions",
    "function_call",
    "moderation",
    "prompt_cache_options",
)
_INT64 = 2**63


def chat_job(body: bytes, model: ServedModel, most_tokens: int | None = None) -> Job:
    """POST /v1/chat/completions. most_tokens: limit of generated tokens per sample, whatever is requested.

    Raises ApiError 400 or 404, as all functions of this file.
    """
    request = decode(body, ChatRequest)
    _check_common(request, model)
    _check_tools(request)
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    if request.top_logprobs and not request.logprobs:
        raise invalid(
            f"top_logprobs is {brief(request.top_logprobs)} without logprobs; legal: beside 'logprobs': true",
            "top_logprobs",
        )
    asked = _asked_tokens(request)
    params = _sampling_params(request, model, {"max_tokens": asked, "logprobs": logprobs}, logprobs="top_logprobs")
    asking = encode_messages(request.messages, model)
    check_length(len(asking.token_ids), model, "messages")
    prompts = (PromptIds(tuple(asking.token_ids)),)
    return Job(
        "chat",
        model.names[0],
        prompts,
        _clamped(_ending_answers(params, asking.stop, model), prompts, model, most_tokens),
        continues_text=asking.continues_text,
        logprobs=logprobs,
        **_asked(request),
    )


def completion_job(body: bytes, model: ServedModel, most_tokens: int | None = None) -> Job:
    """POST /v1/completions; see chat_job."""
    request = decode(body, CompletionRequest)
    _check_common(request, model)
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise invalid(f"best_of is {brief(request.best_of)}; legal: null or n", "best_of", code="unsupported_value")
    echo, asked = bool(request.echo), _asked_tokens(request)
    show_tokens = not (echo and asked == 0)
    max_tokens = COMPLETION_TOKENS if asked is None else asked or int(not show_tokens)
    options = {"max_tokens": max_tokens, "logprobs": request.logprobs}
    if echo:
        options["prompt_logprobs"] = request.logprobs
    params = _sampling_params(request, model, options)
    if request.suffix:
        prompts, params = _infilling(request, params, model)
    else:
        prompts = _prompts(request.prompt, model, echo=echo)
    return Job(
        "completion",
        model.names[0],
        prompts,
        _clamped(params, prompts, model, most_tokens),
        echo=echo,
        show_tokens=show_tokens,
        logprobs=request.logprobs,
        **_asked(request),
    )


def tokenize(body: bytes, model: ServedModel) -> bytes:
    """POST /tokenize; returns the response's JSON."""
    request = decode(body, TokenizeRequest)
    _check_name(request.model, model)
    if (request.prompt is None) == (request.messages is None):
        raise invalid("prompt and messages are both given, or neither is; legal: one of them", "prompt")
    special = request.add_special_tokens
    if request.messages is not None:
        if special:
            raise invalid(
                "add_special_tokens is true beside messages, whose chat format writes them; legal: false or null",
                "add_special_tokens",
            )
        ids = encode_messages(request.messages, model).token_ids
    else:
        text = request.prompt or ""
        check_fits(text, model, "prompt")
        ids = model.tokenizer.encode(text, bos=False if special is False else None)
    return msgspec.json.encode(TokenizeAnswer(count=len(ids), max_model_len=model.max_model_len, tokens=ids))


def detokenize(body: bytes, model: ServedModel) -> bytes:
    """POST /detokenize; returns the response's JSON. Special tokens are left out, as by Tokenizer.decode."""
    request = decode(body, DetokenizeRequest)
    _check_name(request.model, model)
    _check_ids("tokens", request.tokens, model.tokenizer.vocab_size)
    return msgspec.json.encode(DetokenizeAnswer(prompt=model.tokenizer.decode(request.tokens)))


def _check_name(name: str | None, model: ServedModel) -> None:
    if name is None or model.any_name or name in model.names:
        return
    legal = f"legal: {', '.join(map(repr, model.names))}"
    raise ApiError(404, "model_not_found", f"the model {brief(name)} is not served here; {legal}", param="model")


def _check_common(request: CommonRequest, model: ServedModel) -> None:
    """Check fields of both endpoints, other than sampling parameters."""
    _check_name(request.model, model)
    for name in _UNSUPPORTED:
        if (value := getattr(request, name)) is not None:
            raise invalid(f"{name} is {brief(value)}; legal: null", name, code="unsupported_parameter")
    for name, legal in _DEFAULTS.items():
        value = getattr(request, name)
        if value is not None and not any(type(value) is type(each) and value == each for each in legal):
            said = " or ".join(map(_as_json, (*legal, None)))
            raise invalid(f"{name} is {brief(value)}; legal: {said}", name, code="unsupported_value")
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options is given without stream; legal: beside 'stream': true", "stream_options")


def _check_tools(request: ChatRequest) -> None:
    kind = request.response_format.type if request.response_format else "text"
    if kind != "text":
        code = "unsupported_value" if kind in ("json_object", "json_schema") else "invalid_value"
        raise invalid(f"response_format.type is {brief(kind)}; legal: 'text'", "response_format.type", code=code)
    choice = request.tool_choice
    if request.tools and choice != "none":
        raise invalid(
            "tools is given, and Llama 2 was not trained to call tools; legal: null, [] or 'tool_choice': 'none'",
            "tools",
            code="unsupported_parameter",
        )
    if choice not in (None, "none", "auto"):
        said = f"tool_choice is {brief(choice)} without tools; legal: null, 'none' or 'auto'"
        raise invalid(said, "tool_choice", code="unsupported_value")


def _asked_tokens(request: CommonRequest) -> int | None:
    """Returns max_tokens, under either of its names."""
    old, new = request.max_tokens, request.max_completion_tokens
    for name in ("max_tokens", "max_completion_tokens"):
        if (given := getattr(request, name)) is not None and given >= _INT64:  # smaller ones are clamped
            raise invalid(f"{name} is {brief(given)}; legal: an integer of 64 bits", name)
    if old is not None and new is not None and old != new:
        said = f"max_tokens is {brief(old)} and max_completion_tokens {brief(new)}; legal: one of them, or both alike"
        raise invalid(said, "max_tokens")
    return old if new is None else new


def _asked(request: CommonRequest) -> dict[str, Any]:
    """Returns the job's fields that every request has."""
    options, who = request.stream_options, request.safety_identifier or request.user
    return {
        "stream": bool(request.stream),
        "include_usage": bool(options and options.include_usage),
        "user": hashlib.sha256(who.encode()).hexdigest()[:16] if who else None,
    }


def _sampling_params(
    request: CommonRequest, model: ServedModel, more: Mapping[str, Any], **names: str
) -> SamplingParams:
    """Returns a request's sampling parameters; more: its endpoint's own. names: our name -> the client's."""
    if request.max_completion_tokens is not None:
        names["max_tokens"] = "max_completion_tokens"
    options = {name: value for name in _SAMPLING if (value := getattr(request, name)) is not None}
    with _refused_by_name(names):
        check_range("n", options.get("n", 1), 1, model.max_n)
        check_range("temperature", options.get("temperature", 1), 0, 2)
        if request.seed is not None:
            check_range("seed", request.seed, -_INT64, _INT64 - 1)
            options["seed"] = request.seed % _INT64
        options["stop"] = _stops(request.stop)
        _check_count("stop_token_ids", request.stop_token_ids)
        options["logit_bias"] = _logit_bias(request.logit_bias)
        params = SamplingParams(**options, **more)
        for name, token_id in params.largest_ids.items():
            if token_id >= model.vocab_size:
                raise ValueError(f"{name} names token {brief(token_id)}; legal: 0 to {model.vocab_size - 1}")
    return params


@contextmanager
def _refused_by_name(names: Mapping[str, str]) -> Iterator[None]:
    """Turns errors of values, which begin with a field's name, into ApiErrors with the client's name for it."""
    try:
        yield
    except (ValueError, TypeError) as error:
        begin, name, rest = re.fullmatch(r"((?:a token id in )?)(\w+)(.*)", str(error), re.DOTALL).groups()  # type: ignore[union-attr]
        name = names.get(name, name)
        code = "invalid_type" if isinstance(error, TypeError) else "invalid_value"
        raise invalid(f"{begin}{name}{rest}", name, code=code) from None


def _stops(given: str | list[str] | None) -> list[str]:
    stops = [given] if isinstance(given, str) else given or []
    if len(stops) > MAX_STOPS:
        raise ValueError(f"stop has {len(stops)} texts; legal: at most {MAX_STOPS}")
    longest = max(map(len, stops), default=0)
    if longest > MAX_STOP_LENGTH:
        raise ValueError(f"stop has a text of {longest} characters; legal: at most {MAX_STOP_LENGTH}")
    return stops


def _check_count(name: str, given: Any) -> None:
    if given is not None and len(given) > MAX_TOKEN_RULES:
        raise ValueError(f"{name} has {len(given)} entries; legal: at most {MAX_TOKEN_RULES}")


def _logit_bias(given: Mapping[str, float] | None) -> dict[int, float] | None:
    if given is None:
        return None
    _check_count("logit_bias", given)
    biases: dict[int, float] = {}
    for key, bias in given.items():
        if not re.fullmatch("[0-9]{1,18}", key):
            raise ValueError(f"logit_bias has a key {brief(key)}; legal: token ids such as '42'")
        if not -100 <= bias <= 100:
            raise ValueError(f"logit_bias has {brief(bias)} for {brief(key)}; legal: -100 to 100")
        if int(key) in biases:
            raise ValueError(f"logit_bias has {brief(key)} and another key for token {int(key)}; legal: one for each")
        biases[int(key)] = bias
    return biases


def _ending_answers(params: SamplingParams, stop: tuple[str, ...], model: ServedModel) -> SamplingParams:
    """Adds the chat format's stop conditions; stop: its stop strings for this conversation."""
    ends = model.chat_format.stop_token_ids
    ids = [] if params.ignore_eos else [i for i in ends if i not in model.eos_token_ids]
    return params.changed(stop=(*params.stop, *stop), stop_token_ids=(*params.stop_token_ids, *ids))


def _clamped(
    params: SamplingParams, prompts: Sequence[PromptIds], model: ServedModel, most_tokens: int | None
) -> SamplingParams:
    """Limits max_tokens by the context and the key; None means to the end of the context.

    A number that reaches there would be rejected if the KV cache is smaller than the context; None is not.
    """
    limits = [limit for limit in (params.max_tokens, most_tokens) if limit is not None]
    least = min(limits, default=None)
    if least is None or least >= model.max_model_len - min(len(prompt.token_ids) for prompt in prompts):
        return params.changed(max_tokens=None)
    return params.changed(max_tokens=least, min_tokens=min(params.min_tokens, least))


def _infilling(
    request: CompletionRequest, params: SamplingParams, model: ServedModel
) -> tuple[tuple[PromptIds, ...], SamplingParams]:
    """Returns the infilling prompt for the text between prompt and suffix, and parameters that stop at its end."""
    prefix, suffix = "" if request.prompt is None else request.prompt, request.suffix or ""
    infilling = model.tokenizer.infilling
    if infilling is None:
        said = "suffix is given, and this model was not trained to infill; legal: null"
        raise invalid(said, "suffix", code="unsupported_parameter")
    if not isinstance(prefix, str) or request.echo:
        said = "suffix is given with echo, or with a prompt that is not one text; legal: a text as prompt, and no echo"
        raise invalid(said, "suffix", code="unsupported_value")
    check_fits(prefix + suffix, model, "prompt")
    ids = model.tokenizer.encode_infilling(prefix, suffix)
    check_length(len(ids), model, "prompt")
    if not params.ignore_eos:
        params = params.changed(stop_token_ids=(*params.stop_token_ids, infilling.end))
    return (PromptIds(tuple(ids), prefix),), params


def _prompts(given: str | list[Any] | None, model: ServedModel, *, echo: bool) -> tuple[PromptIds, ...]:
    """Returns the prompts of a completion: a text, texts, token ids, or lists of token ids."""
    if not isinstance(given, list) or not given or not isinstance(given[0], (str, list)):
        return (_prompt("prompt", given or "" if given != [] else given, model, echo),)
    if len(given) > MAX_PROMPTS:
        raise invalid(f"prompt has {len(given)} prompts; legal: at most {MAX_PROMPTS}", "prompt")
    return tuple(_prompt(f"prompt[{index}]", each, model, echo) for index, each in enumerate(given))


def _prompt(where: str, given: Any, model: ServedModel, echo: bool) -> PromptIds:
    if isinstance(given, str):
        check_fits(given, model, where)
        tokenizer = model.tokenizer
        ids = tokenizer.encode(given)
        if not ids and tokenizer.bos_token_id is not None:
            ids = [tokenizer.bos_token_id]
        text = given
    elif isinstance(given, list):
        ids = given
        text = ""
    else:
        raise invalid(f"{where} is {brief(given)}; legal: a text or token ids", where, code="invalid_type")
    if not ids:
        raise invalid(f"{where} is empty; legal: at least one token", where)
    check_length(len(ids), model, where)
    if isinstance(given, list):
        _check_ids(where, ids, model.vocab_size)
        text = model.tokenizer.decode(i for i in ids if i < model.tokenizer.vocab_size) if echo else ""
    return PromptIds(tuple(ids), text)


def _check_ids(where: str, ids: Sequence[Any], vocab_size: int) -> None:
    if {int}.issuperset(map(type, ids)) and min(ids, default=0) >= 0 and max(ids, default=0) < vocab_size:
        return  # many times faster than a check of each
    for index, value in enumerate(ids):
        if type(value) is not int or not 0 <= value < vocab_size:
            said = f"{where}[{index}] is {brief(value)}; legal: token ids, 0 to {vocab_size - 1}"
            code = "invalid_value" if type(value) is int else "invalid_type"
            raise invalid(said, f"{where}[{index}]", code=code)


def _as_json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
