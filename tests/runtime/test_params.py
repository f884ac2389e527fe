"""SamplingParams: legal values, refusals and their wording, and copies that callers cannot change."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
import re
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastllama.runtime.params import SamplingParams

FIELDS = {each.name: each.default for each in dataclasses.fields(SamplingParams)}


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
        ("logit_bias", {0: -math.inf, 1: 3.4e38}),
        ("allowed_token_ids", (0,)),
        ("min_tokens", 256),
        ("max_tokens", 10**30),
        ("top_k", 2**63 - 1),
        ("repetition_penalty", 2.0**-126),
        ("repetition_penalty", 3.4e38),
        ("truncate_prompt_tokens", -1),
        ("truncate_prompt_tokens", 1),
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
        ("top_k", -2, "-1 to 9223372036854775807"),
        ("top_k", 2**63, "-1 to 9223372036854775807"),
        ("top_p", 0.0, "above 0"),
        ("top_p", 1.01, "0 to 1"),
        ("top_p", math.nan, "0 to 1"),
        ("min_p", -0.1, "0 to 1"),
        ("min_p", 1.1, "0 to 1"),
        ("repetition_penalty", 0.0, "above 0"),
        ("repetition_penalty", math.inf, "a finite number"),
        ("repetition_penalty", 1e-300, r"1.175494e-38 to 3.402823e\+38, the range of fp32"),
        ("repetition_penalty", 1e39, r"1.175494e-38 to 3.402823e\+38, the range of fp32"),
        ("min_tokens", -1, "0 to 9223372036854775807"),
        ("min_tokens", 257, "at most max_tokens, 256"),
        ("truncate_prompt_tokens", 0, "-1, or at least 1"),
        ("truncate_prompt_tokens", -2, "at least -1"),
        ("bad_words", ["a", ""], "strings of at least one character"),
        ("presence_penalty", 2.1, "-2 to 2"),
        ("frequency_penalty", -2.1, "-2 to 2"),
        ("seed", -1, "0 to 9223372036854775807"),
        ("seed", 2**63, "0 to 9223372036854775807"),
        ("logprobs", 21, "0 to 20"),
        ("prompt_logprobs", -1, "0 to 20"),
    ],
)
def test_an_illegal_value_is_named_with_what_is_legal(name: str, value: Any, legal: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} is {re.escape(repr(value))}; legal: {legal}$"):
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
        ("top_k", np.True_),
        ("top_k", torch.tensor(True)),
        ("top_k", np.float32(2)),
        ("top_k", torch.tensor([2])),
        ("temperature", torch.tensor([0.5])),
        ("temperature", 1j),
        ("min_tokens", 1.0),
        ("include_stop_str_in_output", 1),
        ("bad_words", 3),
        ("bad_words", [3]),
        ("logits_processors", print),
        ("logits_processors", ["print"]),
        ("allowed_token_ids", 3),
        ("allowed_token_ids", np.array([[3]])),
        ("allowed_token_ids", torch.tensor([0.5])),
        ("stop_token_ids", np.array(3)),
        ("truncate_prompt_tokens", True),
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


@pytest.mark.parametrize("name", FIELDS)
def test_none_is_the_default_but_for_max_tokens(name: str) -> None:
    expected = None if name == "max_tokens" else FIELDS[name]
    assert getattr(SamplingParams(**{name: None}), name) == expected
    assert getattr(SamplingParams.from_dict(json.loads(f'{{"{name}": null}}')), name) == expected


def test_max_tokens_of_none_bounds_no_min_tokens() -> None:
    assert SamplingParams(max_tokens=None, min_tokens=10**6).min_tokens == 10**6


@pytest.mark.parametrize("kind", [np.int64, np.uint8, torch.tensor, np.array])
def test_integers_of_numpy_and_torch_become_pythons(kind: Any) -> None:
    names = ("n", "max_tokens", "min_tokens", "top_k", "seed", "logprobs", "prompt_logprobs", "truncate_prompt_tokens")
    params = SamplingParams(
        **{name: kind(3) for name in names}, stop_token_ids=[kind(3)], logit_bias={kind(3).item(): kind(1)}
    )
    assert {type(getattr(params, name)) for name in names} == {int}
    assert params == SamplingParams(**dict.fromkeys(names, 3), stop_token_ids=(3,), logit_bias={3: 1.0})
    assert type(params.stop_token_ids[0]) is int
    json.dumps(dataclasses.asdict(params))


@pytest.mark.parametrize("kind", [np.float32, np.float16, np.float64, torch.tensor, np.array])
def test_reals_of_numpy_and_torch_become_pythons(kind: Any) -> None:
    names = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    params = SamplingParams(**{name: kind(0.5) for name in names}, logit_bias={3: kind(0.5)})
    assert params == SamplingParams(**dict.fromkeys(names, 0.5), logit_bias={3: 0.5})
    assert {type(getattr(params, name)) for name in names} == {float}


@pytest.mark.parametrize("kind", [np.array, torch.tensor, list, iter, np.uint16])
def test_token_ids_may_be_an_array(kind: Any) -> None:
    params = SamplingParams(stop_token_ids=kind([3, 4]), allowed_token_ids=kind([5, 4]))
    assert (params.stop_token_ids, params.allowed_token_ids) == ((3, 4), (5, 4))
    assert {type(i) for i in (*params.stop_token_ids, *(params.allowed_token_ids or ()))} == {int}


@pytest.mark.parametrize("empty", [[], (), np.array([], dtype=np.int64)])
def test_no_allowed_token_is_refused(empty: Any) -> None:
    with pytest.raises(ValueError, match=r"^allowed_token_ids is empty; legal: at least one token id, or None"):
        SamplingParams(allowed_token_ids=empty)


def test_top_k_of_minus_1_is_all() -> None:
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0) == SamplingParams()


@pytest.mark.parametrize(
    ("options", "adjusts", "host_bound"),
    [
        ({}, False, False),
        ({"logit_bias": {}}, False, False),
        ({"temperature": 0, "top_k": 5, "top_p": 0.5, "min_p": 0.1, "logprobs": 3, "stop": "x"}, False, False),
        ({"repetition_penalty": 1.1}, True, False),
        ({"presence_penalty": 0.1}, True, False),
        ({"frequency_penalty": -0.1}, True, False),
        ({"logit_bias": {3: 1.0}}, True, False),
        ({"allowed_token_ids": [3]}, True, False),
        ({"min_tokens": 1}, True, False),
        ({"bad_words": ["x"]}, True, True),
        ({"logits_processors": [print]}, False, True),
    ],
)
def test_what_changes_logits_and_what_needs_tokens_on_the_host(
    options: dict[str, Any], adjusts: bool, host_bound: bool
) -> None:
    params = SamplingParams(**options)
    assert (params.adjusts, params.host_bound) == (adjusts, host_bound)


def identity(_: list[int], logits: torch.Tensor) -> torch.Tensor:
    return logits


FULL = SamplingParams(
    logit_bias={3: -1.0},
    allowed_token_ids=[3, 4],
    bad_words=["x"],
    logits_processors=[identity],
    stop="end",
    seed=3,
    max_tokens=None,
    min_tokens=2,
)


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, dataclasses.replace, lambda it: pickle.loads(pickle.dumps(it))]
)
def test_a_copy_is_equal_and_hashes_alike(again: Any) -> None:
    assert FULL.adjusts
    assert again(FULL) == FULL
    assert hash(again(FULL)) == hash(FULL)
    assert again(FULL).adjusts
    assert len({FULL, again(FULL), SamplingParams(logit_bias={3: -2.0})}) == 2


def test_the_largest_id_of_each_field_that_names_any_and_the_allowed_ones_as_a_set() -> None:
    params = SamplingParams(logit_bias={9: 1.0, 3: -1.0}, allowed_token_ids=[4, 8, 4], stop_token_ids=[2, 7, 5])
    assert params.largest_ids == {"logit_bias": 9, "allowed_token_ids": 8, "stop_token_ids": 7}
    assert params.allowed == frozenset({4, 8})
    assert (SamplingParams(logit_bias={}).largest_ids, SamplingParams().allowed) == ({}, None)


@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize(
    "fields",
    [
        {"seed": 5},
        {"stop": ("a", "b"), "stop_token_ids": (99,), "seed": None},
        {"allowed_token_ids": None},
        {"allowed_token_ids": (50,), "logit_bias": None, "temperature": 0.0, "min_tokens": 0, "bad_words": ()},
    ],
)
def test_changed_is_replace_without_the_checks(fields: dict[str, Any], used: bool) -> None:
    before = dataclasses.replace(FULL)
    if used:
        assert (before.adjusts, before.in_fp32[0], before.allowed) == (True, 1.0, {3, 4})
        assert before.largest_ids == {"logit_bias": 3, "allowed_token_ids": 4}
    changed, expected = before.changed(**fields), dataclasses.replace(before, **fields)
    assert changed == expected
    for name in ("allowed", "largest_ids", "in_fp32", "adjusts"):
        assert getattr(changed, name) == getattr(expected, name)
    assert before == FULL
    assert (changed.allowed is before.allowed) == ("allowed_token_ids" not in fields), "a large set is shared"


def test_numbers_are_held_as_their_fields_type() -> None:
    params = SamplingParams(
        temperature=1, top_p=1, min_p=0, repetition_penalty=2, presence_penalty=1, logit_bias={3: 1}
    )
    held = [params.temperature, params.top_p, params.min_p, params.repetition_penalty, params.presence_penalty]
    assert {type(value) for value in (*held, *(params.logit_bias or {}).values())} == {float}


def test_a_processor_need_not_be_hashable() -> None:
    class Masks(list[int]):
        def __call__(self, _: list[int], logits: torch.Tensor) -> torch.Tensor:
            return logits

    params = SamplingParams(logits_processors=[Masks([3])])
    assert hash(params) == hash(SamplingParams(logits_processors=[Masks([3])]))
    assert params != SamplingParams(logits_processors=[Masks([4])])


def test_positional_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="positional argument"):
        SamplingParams(3)  # type: ignore[misc]


EDGES = [
    *(sign * value for sign in (1, -1) for value in (0, 1, 2, 20, 2**31, 2**63 - 1, 2**63, 2**64, 2**1023, 10**400)),
    *(sign * value for sign in (1.0, -1.0) for value in (0.0, 5e-324, 1e-300, 2.0**-149, 2.0**-126, 0.5, 1.0, 2.0)),
    *(sign * value for sign in (1, -1) for value in (3.4028235e38, 3.5e38, 1e308, math.inf)),
    math.nan,
    None,
    True,
]
NUMBERS = ("n", "max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "logprobs")
NUMBERS += ("prompt_logprobs", "repetition_penalty", "presence_penalty", "frequency_penalty", "truncate_prompt_tokens")


@given(
    options=st.dictionaries(st.sampled_from(NUMBERS), st.sampled_from(EDGES), max_size=3), bias=st.sampled_from(EDGES)
)
def test_what_is_accepted_is_what_the_device_can_hold(options: dict[str, Any], bias: Any) -> None:
    """Other values are refused by name, before numbers meet a type that has no room for them."""
    refusal = ""
    try:
        params = SamplingParams(**options, logit_bias={5: bias}, stop_token_ids=[5])
    except (TypeError, ValueError) as error:
        refusal = str(error)
    if refusal:
        assert refusal.startswith((*options, "logit_bias[5]"))
        return
    biases = params.logit_bias
    assert isinstance(biases, Mapping)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reals = (*params.in_fp32, params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        held = np.array(reals, dtype=np.float32)
        assert np.isfinite(held).all()
        positive = np.array([params.temperature, params.top_p, params.min_p, params.repetition_penalty]) > 0
        assert ((held[:4] > 0) == positive).all(), "a number above 0 stays one"
        assert not np.isnan(np.float32(biases[5]))
        assert np.isinf(np.float32(biases[5])) == (biases[5] == -math.inf)
        np.array([params.top_k, params.min_tokens, params.seed or 0, *params.stop_token_ids, *biases], dtype=np.int64)
