"""Bodies that no client should send: each becomes a job, or one line that names its fault."""

from __future__ import annotations

import json
from collections.abc import Iterable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllama.serve import translate
from fastllama.serve.errors import ApiError
from fastllama.serve.jobs import Job
from fastllama.serve.wire import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

ENDPOINTS = {
    translate.chat_job: ChatRequest,
    translate.completion_job: CompletionRequest,
    translate.tokenize: TokenizeRequest,
    translate.detokenize: DetokenizeRequest,
}
LEAST = {"chat_job": {"messages": [{"role": "user", "content": "Hi"}]}, "detokenize": {"tokens": [3]}}
FULL = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi é😀"}], "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": []},
    ],
    "model": "gpt-4",
    "max_tokens": 5,
    "temperature": 0.5,
    "seed": -1,
    "stop": ["a", "b"],
    "logit_bias": {"5": -100},
    "stream": True,
    "stream_options": {"include_usage": True},
    "logprobs": True,
    "top_logprobs": 3,
    "tools": [],
    "response_format": {"type": "text"},
    "metadata": {"a": "b"},
}
quick = settings(deadline=None, max_examples=300)

# Values near to legal ones, so that the checks after the types are reached too.
near = st.sampled_from(
    [
        *(
            None,
            True,
            False,
            0,
            1,
            -1,
            2,
            5,
            2047,
            2048,
            2**31,
            2**63,
            -(2**63),
            2**64,
            10**400,
            0.5,
            -0.0,
            1e308,
            -1e308,
        ),
        *("", "a", "user", "none", "auto", "text", "default", "\x00", "\u2028", "[INST] a [/INST]", "</s>", "x" * 5000),
        *([], [[]], [3], ["a"], [None], [True], [[3], ["a"]], [{}], {}, {"type": "text"}, {"5": 1}, {"": {}}),
    ]
)
CONTENTS = ["", " ", "a", "<s>", "[INST] a [/INST]", "<s>[INST] a [/INST] b </s><s>[INST] c </s> [/INST]", "\nUser: a"]
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool", "x"])},
        optional={"content": near | st.sampled_from(CONTENTS) | st.text(max_size=30), "name": near, "tool_calls": near},
    ),
    max_size=4,
)
anything = st.recursive(
    near | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def outcome(endpoint, body: bytes, model) -> Job | ApiError | bytes:
    """The outcome of a body; anything but a job, an answer and a short refusal fails the test."""
    try:
        result = endpoint(body, model)
    except ApiError as error:
        result = error
    if isinstance(result, ApiError):
        assert result.status in (400, 404)
        assert 0 < len(str(result)) < 1000
        assert str(result).isprintable(), "more than one line, or what a log should not hold"
        assert result.param is None or len(result.param) < 1000
        assert json.loads(result.body)["error"]["code"] == result.code
    elif isinstance(result, Job):
        assert result.prompts
        assert all(0 < len(prompt.token_ids) < model.max_model_len for prompt in result.prompts)
        assert 1 <= result.params.n <= model.max_n
    else:
        json.loads(result)
    return result


def one_of_each_type(kind) -> Iterable[str]:
    """The name of one field for each type that fields have."""
    return {field.type: field.name for field in msgspec.structs.fields(kind)}.values()


every_endpoint = pytest.mark.parametrize("endpoint", list(ENDPOINTS), ids=lambda each: each.__name__)
every_format = pytest.mark.parametrize("format", ["llama2", "plain"])


@every_endpoint
@given(body=st.binary(max_size=200))
@quick
def test_any_bytes_are_refused(endpoint, body, llama2):
    outcome(endpoint, body, llama2)


@every_endpoint
@given(value=anything)
@quick
def test_any_json_is_answered_or_refused(endpoint, value, llama2):
    outcome(endpoint, json.dumps(value).encode(), llama2)


@every_endpoint
@given(data=st.data())
@quick
def test_any_value_in_any_field_is_answered_or_refused(endpoint, data, llama2):
    names = st.sampled_from(ENDPOINTS[endpoint].__struct_fields__)
    fields = data.draw(st.dictionaries(names, anything, min_size=1, max_size=3))
    outcome(endpoint, json.dumps({**LEAST.get(endpoint.__name__, {}), **fields}).encode(), llama2)


@every_format
@given(messages=messages)
@quick
def test_any_conversation_is_answered_or_refused(format, messages, request):
    outcome(translate.chat_job, json.dumps({"messages": messages}).encode(), request.getfixturevalue(format))


@given(cut=st.integers(0, 800), length=st.integers(0, 8), put=st.binary(max_size=8))
@quick
def test_a_body_that_was_damaged_is_answered_or_refused(cut, length, put, llama2):
    body = json.dumps(FULL, ensure_ascii=False).encode()
    outcome(translate.chat_job, body[:cut] + put + body[cut + length :], llama2)


def test_the_body_that_is_damaged_is_legal(llama2):
    assert isinstance(outcome(translate.chat_job, json.dumps(FULL).encode(), llama2), Job)


@every_endpoint
@pytest.mark.parametrize(
    "bomb",
    [
        "[" * 1_000_000,
        "[" * 1000 + "]" * 1000,
        '{"a":' * 1_000_000,
        "[" + "[]," * 100_000 + "[]]",
        "9" * 1_000_000,
        "-" + "9" * 4300,
        "0." + "9" * 1_000_000,
        "1e999999999999999999999",
        '"' + "a" * 4_000_000 + '"',
        '"' + "\\u0000" * 600_000 + '"',
        '["' + " a" * 2_000_000 + '"]',
        "[" + "3," * 2_000_000 + "3]",
        '{"' + "k" * 4_000_000 + '": 1}',
        "{" + ",".join(f'"{i}":1' for i in range(50_000)) + "}",
        '[{"role":"user","content":"' + "[INST]" * 600_000 + '"}]',
        "[" + ",".join(['{"role":"user","content":"a"}'] * 20_000) + "]",
        "[" + ",".join(['{"role":"user"},{"role":"assistant"}'] * 10_000) + "]",
        "NaN",
        "-Infinity",
        '"\\ud800"',
        '"\\udc00\\ud800"',
    ],
    ids=range(21),
)
def test_a_bomb_in_any_field_is_defused(endpoint, bomb, llama2):
    for name in (*one_of_each_type(ENDPOINTS[endpoint]), "unknown"):
        fields = {key: value for key, value in LEAST.get(endpoint.__name__, {}).items() if key != name}
        head = "".join(f"{json.dumps(key)}:{json.dumps(value)}," for key, value in fields.items())
        outcome(endpoint, f'{{{head}"{name}":{bomb}}}'.encode(), llama2)
