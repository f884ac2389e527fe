"""Prompts of completions, and token counts: legal prompts, echo, infilling, /tokenize and /detokenize."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from fastllama.io.tokenizer.base import InfillingIds
from fastllama.serve import translate
from tests.serve.requesting import HI, complete, refused


def test_prompts_are_texts_or_ids_one_or_several(llama2):
    ids = tuple(llama2.tokenizer.encode("Hi"))
    for prompt, expected in (
        ("Hi", [ids]),
        (["Hi", "Hi"], [ids, ids]),
        ([3, 4], [(3, 4)]),
        ([[3, 4], [2047]], [(3, 4), (2047,)]),
        (["Hi", [3]], [ids, (3,)]),
    ):
        assert [each.token_ids for each in complete(llama2, prompt=prompt).prompts] == expected


@pytest.mark.parametrize("prompt", [None, "", [""]])
def test_no_prompt_is_bos_alone(prompt, llama2):
    assert [each.token_ids for each in complete(llama2, prompt=prompt).prompts] == [(llama2.tokenizer.bos_token_id,)]


class BareTokenizer:
    """A tokenizer that adds no token to a text."""

    least_length = staticmethod(lambda text: 0)

    def __init__(self, bos_token_id: int | None) -> None:
        self.bos_token_id = bos_token_id

    def encode(self, text):
        return list(text.encode())


def test_no_prompt_is_bos_also_where_none_is_put_before_texts(llama2):
    job = complete(dataclasses.replace(llama2, tokenizer=BareTokenizer(1)), prompt=["", "a"])
    assert [each.token_ids for each in job.prompts] == [(1,), (97,)]
    error = refused(complete, dataclasses.replace(llama2, tokenizer=BareTokenizer(None)), prompt="")
    assert (error.param, error.code) == ("prompt", "invalid_value")


def test_the_prompt_may_be_absent(llama2):
    assert translate.completion_job(b"{}", llama2).num_prompt_tokens == 1


@pytest.mark.parametrize(
    ("prompt", "param", "code"),
    [
        ([], "prompt", "invalid_value"),
        ([[]], "prompt[0]", "invalid_value"),
        ([[3], []], "prompt[1]", "invalid_value"),
        ([3, "a"], "prompt[1]", "invalid_type"),
        ([3, True], "prompt[1]", "invalid_type"),
        ([3, 1.5], "prompt[1]", "invalid_type"),
        ([True], "prompt[0]", "invalid_type"),
        ([None], "prompt[0]", "invalid_type"),
        ([3, -1], "prompt[1]", "invalid_value"),
        ([3, 2048], "prompt[1]", "invalid_value"),
        ([10**1000], "prompt[0]", "invalid_value"),
        ([[3], [4, 2048]], "prompt[1][1]", "invalid_value"),
        (["a", 3], "prompt[1]", "invalid_type"),
        (["a", {}], "prompt[1]", "invalid_type"),
        (["a"] * 129, "prompt", "invalid_value"),
        (["a", "b " * 300], "prompt", "context_length_exceeded"),
        ("b " * 300, "prompt", "context_length_exceeded"),
        ([5] * 256, "prompt", "context_length_exceeded"),
    ],
    ids=range(18),
)
def test_a_wrong_prompt_is_refused_by_its_place(prompt, param, code, llama2):
    error = refused(complete, llama2, prompt=prompt)
    assert (error.param, error.code) == (param, code)


def test_a_prompt_may_leave_room_for_one_token(llama2):
    assert complete(llama2, prompt=[5] * 255).num_prompt_tokens == 255


def test_a_text_that_cannot_fit_is_refused_unread(llama2, monkeypatch):
    monkeypatch.setattr(type(llama2.tokenizer), "encode", lambda *_, **__: pytest.fail("it was read"))
    error = refused(complete, llama2, prompt=["x" * 5000])
    assert error.code == "context_length_exceeded"
    assert "prompt[0] has 5000 characters, which are 416 tokens or more" in str(error)


def test_echo_shows_the_prompt(llama2):
    job = complete(llama2, echo=True, logprobs=1, max_tokens=1, prompt=["Hi there", llama2.tokenizer.encode("Bye")])
    assert (job.echo, job.logprobs, job.params.logprobs, job.params.prompt_logprobs) == (True, 1, 1, 1)
    assert [prompt.text for prompt in job.prompts] == ["Hi there", "Bye"]
    assert complete(llama2, echo=True).params.prompt_logprobs is None
    assert complete(llama2, logprobs=3).params.prompt_logprobs is None


def test_of_an_echo_alone_one_token_is_sampled_and_not_shown(llama2):
    job = complete(llama2, echo=True, max_tokens=0)
    assert (job.show_tokens, job.params.max_tokens) == (False, 1)
    assert complete(llama2, echo=True, max_tokens=1).show_tokens


def test_completion_logprobs_are_a_number(llama2):
    for number in (0, 20):
        job = complete(llama2, logprobs=number)
        assert job.logprobs == job.params.logprobs == number
    for number in (-1, 21):
        assert refused(complete, llama2, logprobs=number).param == "logprobs"


def test_best_of_is_n_or_refused(llama2):
    assert complete(llama2, n=2, best_of=2).params.n == 2
    assert complete(llama2, best_of=1).params.n == 1
    for fields in ({"best_of": 2}, {"n": 2, "best_of": 3}, {"n": 2, "best_of": 1}):
        error = refused(complete, llama2, **fields)
        assert (error.param, error.code) == ("best_of", "unsupported_value")


class InfillingTokenizer:
    """A tokenizer with Code Llama's four pieces, whose prompts show what they were made of."""

    infilling = InfillingIds(prefix=100, suffix=101, middle=102, end=103)
    least_length = staticmethod(lambda text: 0)

    def encode_infilling(self, prefix, suffix):
        return [100, *prefix.encode(), 101, *suffix.encode(), 102]


def test_a_suffix_asks_code_llama_for_what_stands_between(llama2):
    model = dataclasses.replace(llama2, tokenizer=InfillingTokenizer())
    job = complete(model, prompt="a", suffix="b")
    assert job.prompts[0].token_ids == (100, 97, 101, 98, 102)
    assert job.params.stop_token_ids == (103,)
    assert complete(model, prompt="a", suffix="b", ignore_eos=True).params.stop_token_ids == ()
    assert complete(model, prompt=None, suffix="b").prompts[0].token_ids == (100, 101, 98, 102)
    for fields in ({"prompt": ["a"]}, {"prompt": [5]}, {"prompt": []}, {"echo": True}):
        error = refused(complete, model, suffix="b", **fields)
        assert (error.param, error.code) == ("suffix", "unsupported_value")
    assert refused(complete, model, prompt="a" * 300, suffix="b").code == "context_length_exceeded"


def test_a_suffix_is_refused_elsewhere_unless_it_is_empty(llama2):
    error = refused(complete, llama2, suffix="b")
    assert (error.param, error.code) == ("suffix", "unsupported_parameter")
    assert complete(llama2, suffix="") == complete(llama2)


def tokenized(model, /, **fields: Any) -> dict[str, Any]:
    return json.loads(translate.tokenize(json.dumps(fields).encode(), model))


def detokenized(model, /, **fields: Any) -> dict[str, Any]:
    return json.loads(translate.detokenize(json.dumps(fields).encode(), model))


def test_a_text_is_tokenized(llama2):
    ids = llama2.tokenizer.encode("Hi there")
    assert tokenized(llama2, prompt="Hi there", model="x") == {"count": len(ids), "max_model_len": 256, "tokens": ids}
    assert tokenized(llama2, prompt="Hi there", add_special_tokens=False)["tokens"] == ids[1:]
    assert tokenized(llama2, prompt="")["tokens"] == [llama2.tokenizer.bos_token_id]


def test_a_conversation_is_tokenized_as_it_is_asked(llama2):
    expected = llama2.chat_format.encode(HI)
    assert tokenized(llama2, messages=HI)["tokens"] == expected
    assert tokenized(llama2, messages=HI, add_special_tokens=False)["tokens"] == expected
    assert refused(tokenized, llama2, messages=HI, add_special_tokens=True).param == "add_special_tokens"


def test_tokens_are_counted_beyond_the_context(llama2):
    assert tokenized(llama2, prompt="b " * 300)["count"] > 256


def test_what_is_tokenized_is_a_text_or_a_conversation(llama2):
    assert refused(tokenized, llama2).param == "prompt"
    assert refused(tokenized, llama2, prompt="a", messages=HI).param == "prompt"
    assert refused(tokenized, llama2, prompt="x" * 5000).code == "context_length_exceeded"
    assert refused(tokenized, dataclasses.replace(llama2, any_name=False), 404, prompt="a", model="b").param == "model"


def test_tokens_are_shown_as_text(llama2):
    ids = llama2.tokenizer.encode("Hi there")
    assert detokenized(llama2, tokens=ids) == {"prompt": "Hi there"}
    assert detokenized(llama2, tokens=[]) == {"prompt": ""}
    assert refused(detokenized, llama2, tokens=[5, 2048]).param == "tokens[1]"
    assert refused(detokenized, llama2, tokens=["a"]).code == "invalid_type"
    assert refused(detokenized, llama2).param == "tokens"
