"""SamplingParams: what is legal, what is refused and how the refusal reads; the values are the object's own."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from fastllama.runtime.params import SamplingParams


def test_defaults() -> None:
    params = SamplingParams()
    assert (params.n, params.max_tokens, params.temperature, params.greedy) == (1, 256, 1.0, False)
    assert (params.stop, params.stop_token_ids, params.logit_bias, params.seed) == ((), (), None, None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0),
        ("temperature", 0.0),
        ("temperature", 1e-300),
        ("top_p", 1),
        ("top_p", 1e-9),
        ("min_p", 0),
        ("min_p", 1),
        ("repetition_penalty", 0.5),
        ("presence_penalty", -2),
        ("frequency_penalty", 2),
        ("seed", 0),
        ("seed", 2**63 - 1),
        ("logprobs", 0),
        ("logprobs", 20),
        ("prompt_logprobs", 0),
        ("logit_bias", {}),
        ("logit_bias", {0: -100}),
    ],
)
def test_the_edge_of_what_is_legal(name: str, value: Any) -> None:
    assert getattr(SamplingParams(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value", "legal"),
    [
        ("n", 0, "at least 1"),
        ("max_tokens", 0, "at least 1"),
        ("temperature", -0.1, "at least 0"),
        ("temperature", math.nan, "at least 0"),
        ("temperature", math.inf, "a finite number"),
        ("temperature", 10**400, "a finite number"),
        ("top_k", -2, "-1 to 9223372036854775807"),
        ("top_k", 2**63, "-1 to 9223372036854775807"),
        ("top_p", 0, "above 0"),
        ("top_p", 1.01, "0 to 1"),
        ("top_p", math.nan, "0 to 1"),
        ("min_p", -0.1, "0 to 1"),
        ("min_p", 1.1, "0 to 1"),
        ("repetition_penalty", 0.0, "above 0"),
        ("repetition_penalty", math.inf, "a finite number"),
        ("presence_penalty", 2.1, "-2 to 2"),
        ("frequency_penalty", -2.1, "-2 to 2"),
        ("seed", -1, "0 to 9223372036854775807"),
        ("seed", 2**63, "0 to 9223372036854775807"),
        ("logprobs", 21, "0 to 20"),
        ("prompt_logprobs", -1, "0 to 20"),
    ],
)
def test_an_illegal_value_is_named_with_what_is_legal(name: str, value: Any, legal: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} is {value!r}; legal: {legal}$"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("bias", [math.nan, math.inf, 1e39, -1e39, 10**400])
def test_a_bias_is_what_fp32_holds_or_a_ban(bias: float) -> None:
    with pytest.raises(ValueError, match=r"^logit_bias\[7\] is .*; legal: "):
        SamplingParams(logit_bias={7: bias})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 1.0),
        ("n", True),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_k", 2.5),
        ("seed", "1"),
        ("ignore_eos", 1),
        ("stop", 3),
        ("stop", b"end"),
        ("stop", ["end", 3]),
        ("stop_token_ids", 3),
        ("stop_token_ids", ["3"]),
        ("stop_token_ids", "3"),
        ("logit_bias", [3]),
        ("logit_bias", {"3": 1.0}),
        ("logit_bias", {3: "1"}),
        ("logprobs", True),
    ],
)
def test_a_wrong_type_is_named(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("ids", [{"stop_token_ids": [5, -1]}, {"logit_bias": {5: 0.0, -1: 0.0}}])
def test_token_ids_are_not_negative(ids: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^a token id in {next(iter(ids))} is -1; legal: 0 to 9223372036854775807$"):
        SamplingParams(**ids)


def test_stop_becomes_a_tuple() -> None:
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop=[]).stop == ()


@pytest.mark.parametrize("stop", ["", ["end", ""]])
def test_an_empty_stop_string_is_refused(stop: Any) -> None:
    with pytest.raises(ValueError, match=r"^stop is .*; legal: strings of at least one character$"):
        SamplingParams(stop=stop)


def test_later_changes_of_the_caller_do_not_reach_a_request() -> None:
    bias, ids, stop = {1: 2.0}, [3], ["end"]
    params = SamplingParams(logit_bias=bias, stop_token_ids=ids, stop=stop)
    bias[9], ids[0], stop[0] = 9.0, 9, "x"
    assert (params.logit_bias, params.stop_token_ids, params.stop) == ({1: 2.0}, (3,), ("end",))


@pytest.mark.parametrize(("temperature", "greedy"), [(0, True), (0.0, True), (1e-9, False), (1.0, False)])
def test_only_temperature_zero_is_greedy(temperature: float, greedy: bool) -> None:
    assert SamplingParams(temperature=temperature).greedy is greedy


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().n = 2  # type: ignore[misc]


def test_replace_checks_anew() -> None:
    params = SamplingParams(stop="end")
    assert dataclasses.replace(params, n=3).stop == ("end",)
    with pytest.raises(ValueError, match="n is 0"):
        dataclasses.replace(params, n=0)


def test_from_dict() -> None:
    assert SamplingParams.from_dict({"temperature": 0, "stop": "x"}) == SamplingParams(temperature=0, stop="x")
    with pytest.raises(
        TypeError,
        match=r"^SamplingParams got an unknown option 'temprature'; did you mean 'temperature'\? Legal options: n, ",
    ):
        SamplingParams.from_dict({"temprature": 0})
