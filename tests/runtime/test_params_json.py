"""SamplingParams.from_dict: values as JSON has them, OpenAI's fields for log-probabilities, and refusals."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from fastllama.runtime.params import SamplingParams


def test_from_dict() -> None:
    assert SamplingParams.from_dict({"temperature": 0, "stop": "x"}) == SamplingParams(temperature=0, stop="x")
    with pytest.raises(
        TypeError,
        match=r"^SamplingParams got an unknown option 'temprature'; did you mean 'temperature'\? Legal options: n, ",
    ):
        SamplingParams.from_dict({"temprature": 0})


@pytest.mark.parametrize("options", ["x", None, [("n", 1)], SamplingParams(n=2)])
def test_from_dict_of_anything_but_a_mapping_is_refused(options: Any) -> None:
    with pytest.raises(TypeError, match=r"^options is .*; legal: a mapping of SamplingParams' fields to their values$"):
        SamplingParams.from_dict(options)


def test_a_name_that_is_no_string_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^options has a name 1 of type int; legal: strings$"):
        SamplingParams.from_dict({1: 2})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("options", "logprobs"),
    [
        ({"logprobs": True}, 0),
        ({"logprobs": False}, None),
        ({"logprobs": True, "top_logprobs": 5}, 5),
        ({"logprobs": True, "top_logprobs": None}, 0),
        ({"logprobs": False, "top_logprobs": 0}, None),
        ({"logprobs": None, "top_logprobs": None}, None),
        ({"logprobs": 3, "top_logprobs": None}, 3),
    ],
)
def test_logprobs_as_openais_chat_api_asks_for_them(options: dict[str, Any], logprobs: int | None) -> None:
    given = dict(options)
    assert SamplingParams.from_dict(options).logprobs == logprobs
    assert options == given, "a caller's own"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"logprobs": False, "top_logprobs": 5},
            "top_logprobs is 5 beside logprobs=False; legal: beside logprobs=True",
        ),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs is 21; legal: 0 to 20"),
        ({"logprobs": True, "top_logprobs": True}, "top_logprobs must be an integer, got True of type bool"),
        ({"top_logprobs": 5}, "SamplingParams got an unknown option 'top_logprobs'; did you mean 'logprobs'?"),
        ({"logprobs": 3, "top_logprobs": 5}, "SamplingParams got an unknown option 'top_logprobs'; did you mean 'lo"),
    ],
)
def test_top_logprobs_beside_anything_else_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as refused:
        SamplingParams.from_dict(options)
    assert str(refused.value).startswith(message)


def test_json_gives_the_keys_of_biases_as_strings() -> None:
    body = '{"logit_bias": {"7": -100, "0": -Infinity, "9": 1.5}, "stop": null, "max_tokens": 5}'
    expected = SamplingParams(logit_bias={7: -100, 0: -math.inf, 9: 1.5}, max_tokens=5)
    assert SamplingParams.from_dict(json.loads(body)) == expected


@pytest.mark.parametrize("key", ["x", "", "7.0", " 7", "\u0667", "9" * 5000, "1e3", None, 7.0])
def test_a_key_that_spells_no_integer_is_refused(key: Any) -> None:
    with pytest.raises(TypeError, match=r"^a token id in logit_bias must be an integer"):
        SamplingParams.from_dict({"logit_bias": {key: 1.0}})


@pytest.mark.parametrize("minus", ["-1", "-0"])
def test_a_key_that_spells_a_number_below_0_is_refused(minus: str) -> None:
    if int(minus) == 0:
        assert SamplingParams.from_dict({"logit_bias": {minus: 1.0}}).logit_bias == {0: 1.0}
    else:
        with pytest.raises(ValueError, match=r"^a token id in logit_bias is -1; legal: 0 to "):
            SamplingParams.from_dict({"logit_bias": {minus: 1.0}})
