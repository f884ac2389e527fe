"""Requests of OpenAI's two completion endpoints to jobs: every field is honoured or refused by its name."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import pytest

from fastllama.serve import translate
from tests.serve.requesting import HI, chat, complete, refused

both = pytest.mark.parametrize("make", [chat, complete])


def test_a_chat_without_options_is_openai_s_defaults(llama2):
    job = chat(llama2)
    params = job.params
    assert (job.kind, job.model, job.stream, job.continues_text, job.logprobs, job.user) == (
        ("chat", "tiny", False, False, None, None)
    )
    assert (params.n, params.temperature, params.top_p, params.top_k) == (1, 1.0, 1.0, 0)
    assert (params.presence_penalty, params.frequency_penalty, params.seed, params.logprobs) == (0.0, 0.0, None, None)
    assert params.max_tokens is None, "to the end of the context"
    assert [list(prompt.token_ids) for prompt in job.prompts] == [llama2.chat_format.encode(HI)]


def test_a_completion_without_options_has_sixteen_tokens(llama2):
    job = complete(llama2)
    assert (job.kind, job.echo, job.show_tokens, job.params.max_tokens) == ("completion", False, True, 16)
    assert [(list(each.token_ids), each.text) for each in job.prompts] == [(llama2.tokenizer.encode("Hi"), "Hi")]


@both
def test_null_is_the_default_of_every_field(make, llama2):
    kind = translate.ChatRequest if make is chat else translate.CompletionRequest
    nulls = {name: None for name in kind.__struct_fields__ if name not in ("messages", "prompt")}
    assert make(llama2, **nulls) == make(llama2)


@both
def test_sampling_options_reach_the_engine(make, llama2):
    options = {
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "presence_penalty": -1.5,
        "frequency_penalty": 2,
        "min_tokens": 3,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "stop_token_ids": [7, 9],
        "ignore_eos": True,
        "skip_special_tokens": False,
        "max_tokens": 20,
        "seed": 11,
    }
    params = make(llama2, **options).params
    assert {name: getattr(params, name) for name in options} == {**options, "stop_token_ids": (7, 9)}


def test_what_a_client_of_2023_sends_is_legal(llama2):
    job = chat(llama2, model="gpt-3.5-turbo", max_tokens=4096, n=1, temperature=0.7, stream=False)
    assert (job.model, job.params.max_tokens, job.params.temperature) == ("tiny", None, 0.7)


def test_what_langchain_s_completions_send_is_legal(llama2):
    job = complete(llama2, prompt=["Hi"], seed=None, logprobs=None, n=1, top_p=1, frequency_penalty=0, best_of=1)
    assert job.params.n == 1


@both
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_tokens_are_bounded_under_either_name(make, name, llama2):
    assert make(llama2, **{name: 7}).params.max_tokens == 7
    error = refused(make, llama2, **{name: -3})
    assert (error.param, error.code) == (name, "invalid_value")
    assert str(error).startswith(f"{name} is -3")
    assert refused(make, llama2, **{name: 0}).param == name


@both
def test_both_names_may_agree_and_not_differ(make, llama2):
    assert make(llama2, max_tokens=7, max_completion_tokens=7).params.max_tokens == 7
    assert refused(make, llama2, max_tokens=7, max_completion_tokens=8).param == "max_tokens"


@both
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_number_of_tokens_beyond_64_bits_is_no_number_of_tokens(make, llama2, name):
    assert make(llama2, **{name: 2**63 - 1}).params.max_tokens is None
    error = refused(make, llama2, **{name: 10**1000})
    assert (error.param, len(str(error)) < 200) == (name, True)


@both
@pytest.mark.parametrize("most", [10**6, 2**62])
def test_what_reaches_beyond_the_context_is_to_its_end(make, most, llama2):
    assert make(llama2, max_tokens=most).params.max_tokens is None


def test_what_just_fits_the_context_is_the_same_as_all_of_it(llama2):
    room = llama2.max_model_len - complete(llama2).num_prompt_tokens
    assert complete(llama2, max_tokens=room).params.max_tokens is None
    assert complete(llama2, max_tokens=room - 1).params.max_tokens == room - 1


@both
def test_a_key_s_limit_clamps_what_is_asked_for(make, llama2):
    assert make(llama2, 5).params.max_tokens == 5
    assert make(llama2, 5, max_tokens=9, min_tokens=8).params.max_tokens == 5
    assert make(llama2, 5, max_tokens=9, min_tokens=8).params.min_tokens == 5
    assert make(llama2, 5, max_tokens=3).params.max_tokens == 3
    assert make(llama2, 10**9, max_tokens=10**9).params.max_tokens is None


def test_a_minimum_above_the_maximum_is_refused(llama2):
    error = refused(chat, llama2, max_completion_tokens=3, min_tokens=8)
    assert error.param == "min_tokens"


@both
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("n", 5),
        ("n", 10**1000),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("top_p", 0),
        ("top_p", 1.1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("min_tokens", -1),
        ("top_k", -2),
        ("min_p", 1.5),
        ("repetition_penalty", 0),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["a"] * 17),
        ("stop", "a" * 1001),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [5, 2048]),
        ("stop_token_ids", [10**1000]),
        ("stop_token_ids", [1] * 1025),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"2048": 1}),
        ("logit_bias", {"9" * 5000: 1}),
        ("logit_bias", {"٣": 1}),
        ("logit_bias", {"5": 100.5}),
        ("logit_bias", {"5": -101}),
        ("logit_bias", {str(i): 1 for i in range(1025)}),
    ],
    ids=range(31),
)
def test_an_illegal_value_is_refused_by_its_name(make, name, value, llama2):
    error = refused(make, llama2, **{name: value})
    assert (error.param, error.code) == (name, "invalid_value")
    assert "legal: " in str(error)


@both
def test_legal_bounds_are_legal(make, llama2):
    for fields in ({"n": 4}, {"temperature": 2}, {"temperature": 0}, {"top_p": 1}, {"stop": ["a" * 1000] * 16}):
        make(llama2, **fields)


@both
@pytest.mark.parametrize("seed", [0, 2**63 - 1, -1, -(2**63)])
def test_any_seed_of_64_bits_is_legal(make, seed, llama2):
    assert make(llama2, seed=seed).params.seed == seed % 2**63


@both
def test_stops_are_one_text_or_several(make, llama2):
    assert make(llama2, stop="a").params.stop == ("a",)
    assert make(llama2, stop=["a", "b"]).params.stop == ("a", "b")
    assert make(llama2, stop=[]).params.stop == ()


@both
def test_a_bias_is_by_token_id(make, llama2):
    assert make(llama2, logit_bias={"5": -100, "2047": 3.5}).params.logit_bias == {5: -100.0, 2047: 3.5}
    assert not make(llama2, logit_bias={}).params.logit_bias


def test_unknown_names_are_answered_unless_names_are_given(llama2):
    assert chat(llama2, model="gpt-4").model == "tiny"
    strict = dataclasses.replace(llama2, any_name=False)
    assert chat(strict, model="alias").model == "tiny"
    assert chat(strict).model == "tiny"
    for make in (chat, complete):
        error = refused(make, strict, 404, model="gpt-4")
        assert (error.code, error.param) == ("model_not_found", "model")
        assert "'tiny', 'alias'" in str(error)


@both
def test_usage_of_a_stream_is_asked_for_beside_stream(make, llama2):
    job = make(llama2, stream=True, stream_options={"include_usage": True, "include_obfuscation": True})
    assert (job.stream, job.include_usage) == (True, True)
    assert not make(llama2, stream=True, stream_options={"include_usage": None}).include_usage
    assert refused(make, llama2, stream_options={"include_usage": True}).param == "stream_options"
    assert refused(make, llama2, stream=False, stream_options={}).param == "stream_options"


@both
def test_who_asks_is_known_by_a_hash(make, llama2):
    hashed = hashlib.sha256(b"ann@example.org").hexdigest()[:16]
    assert make(llama2, user="ann@example.org").user == hashed
    assert make(llama2, user="x", safety_identifier="ann@example.org").user == hashed
    assert make(llama2, user="").user is None


@both
def test_metadata_are_texts(make, llama2):
    assert refused(make, llama2, metadata={"a": 10**1000}).status == 400
    assert refused(make, llama2, metadata={"a": 1}).code == "invalid_type"


@both
def test_fields_that_change_no_text_are_accepted(make, llama2):
    fields = {"metadata": {"a": "b"}, "prompt_cache_key": "k", "prompt_cache_retention": "24h"}
    assert make(llama2, **fields) == make(llama2)


@both
@pytest.mark.parametrize(
    ("name", "default", "other"),
    [
        ("store", False, True),
        ("store", False, 0),
        ("service_tier", "auto", "flex"),
        ("service_tier", "default", "priority"),
        ("modalities", ["text"], ["text", "audio"]),
        ("parallel_tool_calls", True, False),
        ("reasoning_effort", "medium", "high"),
        ("reasoning_effort", "none", {"a": 1}),
        ("verbosity", "medium", "low"),
    ],
)
def test_of_some_fields_the_default_alone_is_legal(make, name, default, other, llama2):
    assert make(llama2, **{name: default}) == make(llama2)
    error = refused(make, llama2, **{name: other})
    assert (error.param, error.code) == (name, "unsupported_value")
    assert json.dumps(default).replace(" ", "") in str(error)


@both
def test_logit_bias_has_one_number_for_each_token(make, llama2):
    error = refused(make, llama2, logit_bias={"05": 100, "5": -100})
    assert (error.param, error.code) == ("logit_bias", "invalid_value")
    assert str(error) == "logit_bias has '5' and another key for token 5; legal: one for each"
    assert make(llama2, logit_bias={"05": 100, "6": -100}).params.logit_bias == {5: 100, 6: -100}


@both
@pytest.mark.parametrize("name", translate._UNSUPPORTED)
def test_what_this_server_cannot_do_is_refused_unless_null(make, name, llama2):
    error = refused(make, llama2, **{name: {"a": 1}})
    assert (error.param, error.code) == (name, "unsupported_parameter")


@both
def test_unknown_fields_are_refused(make, llama2):
    error = refused(make, llama2, max_new_tokens=5)
    assert (error.param, error.code) == ("max_new_tokens", "unknown_parameter")


def test_an_answer_ends_where_the_chat_format_s_do(plain):
    turns = [{"role": "system", "content": "Be brief."}, *HI]
    params = chat(plain, stop=["x"], stop_token_ids=[9], messages=turns).params
    assert params.stop == ("x", "\nUser:")
    assert params.stop_token_ids == (9,), "the format's own is the model's EOS"
    other = dataclasses.replace(plain, eos_token_ids=())
    assert chat(other, stop_token_ids=[9]).params.stop_token_ids == (9, plain.tokenizer.eos_token_id)
    assert chat(other, ignore_eos=True).params.stop_token_ids == ()
    assert complete(plain).params.stop == ()


@pytest.mark.parametrize("text", ["Hi", "User: Hi\nBot:", "[INST] Hi [/INST]"])
def test_a_prompt_as_it_stands_is_answered_beyond_what_ends_turns_in_plain_text(text, plain):
    alone = [{"role": "user", "content": text}]
    assert chat(plain, messages=alone, stop=["x"]).params.stop == ("x",)
    assert chat(plain, messages=[*alone, {"role": "assistant", "content": " "}]).params.stop == ()
    assert chat(plain, messages=[*alone, {"role": "assistant", "content": "He"}]).params.stop == ("\nUser:",)


def test_an_answer_is_a_text_of_its_own_unless_it_continues_a_message(llama2):
    assert not chat(llama2).continues_text
    for content, continues in (("He", True), (" He", True), ("He ", False), ("He\n", False), (" ", False), ("", False)):
        job = chat(llama2, messages=[*HI, {"role": "assistant", "content": content}])
        assert job.continues_text == continues, content
    assert complete(llama2).continues_text


def test_chat_logprobs_are_a_flag_and_a_number(llama2):
    for fields, expected in (
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 20}, 20),
        ({"logprobs": False, "top_logprobs": 0}, None),
    ):
        job = chat(llama2, **fields)
        assert job.logprobs == job.params.logprobs == expected
        assert job.params.prompt_logprobs is None
    for fields in ({"logprobs": True, "top_logprobs": 21}, {"logprobs": True, "top_logprobs": -1}, {"top_logprobs": 2}):
        error = refused(chat, llama2, **fields)
        assert error.param == "top_logprobs"
        assert str(error).startswith("top_logprobs is ")


def test_text_is_the_only_format_of_answers(llama2):
    assert chat(llama2, response_format={"type": "text"}) == chat(llama2)
    for kind, code in (
        ("json_object", "unsupported_value"),
        ("json_schema", "unsupported_value"),
        ("xml", "invalid_value"),
    ):
        error = refused(chat, llama2, response_format={"type": kind})
        assert (error.param, error.code) == ("response_format.type", code)


def test_tools_are_refused_unless_they_must_not_be_called(llama2):
    tool = {"type": "function", "function": {"name": "f"}}
    for fields in ({"tools": []}, {"tools": [tool], "tool_choice": "none"}, {"tool_choice": "auto"}):
        assert chat(llama2, **fields) == chat(llama2)
    for fields in ({"tools": [tool]}, {"tools": [tool], "tool_choice": "auto"}, {"tools": [tool], "tool_choice": tool}):
        error = refused(chat, llama2, **fields)
        assert (error.param, error.code) == ("tools", "unsupported_parameter")
        assert "not trained" in str(error)
    assert refused(chat, llama2, tool_choice=tool).param == "tool_choice"
    assert refused(chat, llama2, tool_choice="required").code == "unsupported_value"


def test_a_conversation_beyond_the_context_is_refused_with_both_numbers(llama2):
    error = refused(chat, llama2, messages=[{"role": "user", "content": "a b c " * 100}])
    assert (error.param, error.code) == ("messages", "context_length_exceeded")
    seen = len(llama2.chat_format.encode([{"role": "user", "content": "a b c " * 100}]))
    assert "256" in str(error)
    assert str(seen) in str(error)
