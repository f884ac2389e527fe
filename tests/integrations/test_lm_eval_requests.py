"""lm-eval's requests become scored prompts and sampling parameters; lm-eval itself need not be installed."""

from __future__ import annotations

from typing import Any

import pytest

from fastllama import SamplingParams
from fastllama.integrations.lm_eval_requests import (
    ScoredPrompt,
    fitting_context,
    generation_params,
    rolling_windows,
    scored_pair,
)

EOS = {"</s>": 2}


def params(**options: Any) -> SamplingParams:
    return generation_params(options, 256, EOS.get)


@pytest.mark.parametrize(
    ("context", "continuation", "max_length", "kept"),
    [
        ([1, 2, 3], [4, 5], 8, [1, 2, 3, 4, 5]),
        ([1, 2, 3], [4, 5], 4, [1, 2, 3, 4, 5]),  # the last token is not fed
        ([1, 2, 3], [4, 5], 3, [2, 3, 4, 5]),
        ([1, 2, 3], [4, 5], 2, [3, 4, 5]),
        ([1], [4], 1, [1, 4]),
    ],
)
def test_a_pair_is_cut_on_the_left_and_its_continuation_scored(
    context: list[int], continuation: list[int], max_length: int, kept: list[int]
) -> None:
    found = scored_pair(context, continuation, max_length)
    assert found.token_ids == kept
    assert found.token_ids[found.start :] == continuation


@pytest.mark.parametrize("continuation", [[], [4, 5, 6]], ids=["empty", "too long"])
def test_a_continuation_that_cannot_be_scored_is_refused(continuation: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"has {len(continuation)} tokens; legal: 1 to 2, the model's context"):
        scored_pair([1, 2, 3], continuation, 2)


def test_rolling_windows_are_those_of_lm_evals_documentation() -> None:
    """Ten tokens, a context of four: the example of LM.loglikelihood_rolling, where 9 and 9 are BOS."""
    assert rolling_windows(range(10), 99, 4) == [
        ScoredPrompt([99, 0, 1, 2, 3], 1),
        ScoredPrompt([3, 4, 5, 6, 7], 1),
        ScoredPrompt([5, 6, 7, 8, 9], 3),
    ]
    assert rolling_windows([], 99, 4) == [], "a text without tokens has nothing to score"


@pytest.mark.parametrize("count", [1, 4, 5, 8, 9, 23])
@pytest.mark.parametrize("max_length", [1, 4, 30])
def test_rolling_windows_score_each_token_once_with_the_text_before_it(count: int, max_length: int) -> None:
    text = [99, *range(count)]
    windows = rolling_windows(range(count), 99, max_length)
    assert [token for each in windows for token in each.token_ids[each.start :]] == list(range(count))
    for each in windows:
        end = text.index(each.token_ids[-1]) + 1
        assert each.token_ids == text[max(0, end - max_length - 1) : end], "a window is a full one, or from the prefix"


def test_a_tasks_names_become_sampling_parameters() -> None:
    found = params(
        until=["\n\n", "Question:", ""], max_gen_toks=32, do_sample=True, temperature=0.7, top_p=0.9, top_k=5
    )
    assert found == SamplingParams(max_tokens=32, temperature=0.7, top_p=0.9, top_k=5, stop=["\n\n", "Question:"])


@pytest.mark.parametrize(
    ("options", "temperature"),
    [
        ({}, 0),
        ({"do_sample": False}, 0),
        ({"do_sample": False, "temperature": 0.7}, 0),
        ({"temperature": 0.7}, 0.7),
        ({"do_sample": True, "temperature": 0.7}, 0.7),
        ({"do_sample": True}, 0),
        ({"do_sample": None, "temperature": None}, 0),
    ],
)
def test_tokens_are_the_likeliest_unless_a_temperature_asks_for_samples(
    options: dict[str, Any], temperature: float
) -> None:
    assert params(**options).temperature == temperature


@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({}, 256),
        ({"max_tokens": 7}, 7),
        ({"max_new_tokens": 8, "max_tokens": 7}, 8),
        ({"max_completion_tokens": 6, "max_gen_toks": 9}, 9),
    ],
)
def test_the_length_has_lm_evals_names_and_precedence(options: dict[str, int], length: int) -> None:
    assert params(**options).max_tokens == length


def test_a_stop_string_that_is_a_special_token_is_one() -> None:
    """Special tokens are left out of an answer, so their letters never come in one."""
    found = params(until=["</s>", "."])
    assert (found.stop, found.stop_token_ids) == ((".",), (2,))
    assert params(until="</s>").stop_token_ids == (2,)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"length_penalty": 2}, TypeError, "unknown option 'length_penalty'"),
        ({"num_beams": 4}, ValueError, "num_beams of a task's generation_kwargs is 4; legal: 1"),
        ({"until": 3}, TypeError, "until of a task's generation_kwargs is 3; legal: a text or a list of texts"),
        ({"top_p": 2}, ValueError, "top_p"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_a_task_may_not_ask_is_refused_by_name(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        params(**options)
    assert params(num_beams=1).max_tokens == 256


def test_a_context_keeps_its_last_tokens_beside_the_answer() -> None:
    assert fitting_context(range(10), 3, 8) == [5, 6, 7, 8, 9]
    assert fitting_context(range(5), 3, 8) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="max_gen_toks is 8; legal: less than max_length, 8 tokens"):
        fitting_context([1], 8, 8)
