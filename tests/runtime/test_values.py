"""Values of SamplingParams at the boundary: of any length, shape or signature, refused or held in a sentence."""

from __future__ import annotations

import copy
import json
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from fastllama.runtime.params import SamplingParams


def identity(_: list[int], logits: torch.Tensor) -> torch.Tensor:
    return logits


@pytest.mark.parametrize("array", [np.array([1.0, 2.0]), torch.tensor([1.0, 2.0]), torch.tensor([1.0]), [1.0]])
def test_a_bias_is_one_number(array: Any) -> None:
    with pytest.raises(TypeError, match=r"^logit_bias\[5\] must be a number, got .* of type "):
        SamplingParams(logit_bias={5: array})


@pytest.mark.parametrize("given", ["end", np.str_("end"), np.array("end"), np.array(["end"]), {"end"}, iter(["end"])])
def test_stop_strings_come_in_anything_that_holds_them(given: Any) -> None:
    assert SamplingParams(stop=given).stop == ("end",)


@pytest.mark.parametrize(
    "change",
    [
        lambda biases: biases.__setitem__(5, math.nan),
        lambda biases: biases.__delitem__(5),
        lambda biases: biases.update({5: 2.0}),
        lambda biases: biases.__ior__({5: 2.0}),
        lambda biases: biases.pop(5),
        lambda biases: biases.popitem(),
        lambda biases: biases.setdefault(6, 2.0),
        lambda biases: biases.clear(),
    ],
)
def test_checked_biases_do_not_change(change: Any) -> None:
    params = SamplingParams(logit_bias={5: 1.0})
    with pytest.raises(TypeError, match=r"^logit_bias of SamplingParams is immutable; "):
        change(params.logit_bias)
    for again in (params, copy.copy(params), copy.deepcopy(params), pickle.loads(pickle.dumps(params))):
        assert again.logit_bias == {5: 1.0}
        assert type(again.logit_bias) is type(params.logit_bias)
    assert json.dumps(params.logit_bias) == '{"5": 1.0}'


LONG = 10**5000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 10**400}, "temperature is an integer of 401 digits; legal: a finite number"),
        ({"top_k": -LONG}, "top_k is minus an integer of 5001 digits; legal: -1 to 9223372036854775807"),
        ({"n": LONG}, "n is an integer of 5001 digits; legal: below 2**10000"),
        ({"max_tokens": LONG}, "max_tokens is an integer of 5001 digits; legal: below 2**10000"),
        ({"stop": LONG}, "stop must be a string or strings, got an integer of 5001 digits of type int"),
        ({"logit_bias": {LONG: 1}}, "a token id in logit_bias is an integer of 5001 digits; legal: 0 to "),
        ({"logit_bias": {1: LONG}}, "logit_bias[1] is an integer of 5001 digits; legal: a finite number"),
        ({"logprobs": [LONG]}, "logprobs must be an integer, got [an integer of 5001 digits] of type list"),
        ({"stop": ["x" * 10**6, ""]}, "stop is ['xxxxxxxxxx"),
        ({"bad_words": ["x"] * 10**6 + [""]}, "bad_words is ['x', 'x', "),
        ({"logit_bias": list(range(10**6))}, "logit_bias must map token ids to numbers, got [0, 1, 2, "),
        ({"allowed_token_ids": [1, "y" * 10**6]}, "a token id in allowed_token_ids must be an integer, got 'yyyyyyy"),
        (
            {"min_tokens": 10**10, "max_tokens": 10**9},
            "min_tokens is 10000000000; legal: at most max_tokens, 1000000000",
        ),
        ({"x" * 10**6: 1}, "SamplingParams got an unknown option 'xxxxxx"),
    ],
)
def test_a_value_of_any_length_is_refused_in_a_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as refused:
        SamplingParams(**options)
    assert str(refused.value).startswith(message)
    assert len(str(refused.value)) < 1000


def test_a_representation_is_of_any_parameters_and_short() -> None:
    class Nameless:
        def __repr__(self) -> str:
            raise RuntimeError

        def __call__(self, _: list[int], logits: torch.Tensor) -> torch.Tensor:
            return logits

    assert repr(SamplingParams(seed=7, stop="end")).startswith("SamplingParams(n=1, max_tokens=256, min_tokens=0, ")
    assert "seed=7, stop=('end',), stop_token_ids=()," in repr(SamplingParams(seed=7, stop="end"))
    large = SamplingParams(
        logits_processors=[Nameless()], max_tokens=10**2000, stop="x" * 10**6, allowed_token_ids=range(10**5)
    )
    assert "max_tokens=an integer of 2001 digits, " in repr(large)
    assert "Nameless instance at" in repr(large)
    assert len(repr(large)) < 2000


@pytest.mark.parametrize(
    "processor", [lambda prompt, generated, logits: logits, lambda logits: logits, lambda generated, *, logits: logits]
)
def test_a_processor_of_other_arguments_is_refused_at_once(processor: Any) -> None:
    with pytest.raises(
        TypeError, match=r"^logits_processors holds .*, which takes \(.*\); legal: callables of two arg"
    ):
        SamplingParams(logits_processors=[identity, processor])


def test_a_processor_may_have_more_arguments_with_defaults_or_no_signature() -> None:
    class Unsigned:
        __signature__ = 3

        def __call__(self, _: list[int], logits: torch.Tensor) -> torch.Tensor:
            return logits

    processors = (torch.nn.Identity(), lambda generated, logits, more=3: logits, lambda *all_of_them: 0, Unsigned())
    assert SamplingParams(logits_processors=processors).logits_processors == processors
