"""Bytes to a request: a malformed body is refused with an error code, and with the field as OpenAI writes it."""

from __future__ import annotations

import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastllama.serve import decoding
from fastllama.serve.decoding import decode
from fastllama.serve.errors import ApiError
from fastllama.serve.wire import ChatRequest, CompletionRequest

MESSAGES = '"messages": [{"role": "user", "content": "Hi"}]'


def refused(body: str | bytes, kind=ChatRequest) -> ApiError:
    with pytest.raises(ApiError) as caught:
        decode(body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body, kind)
    assert caught.value.status == 400
    message = str(caught.value)
    assert len(message) < 1000
    assert message.isprintable()
    return caught.value


def test_a_request_is_read_with_null_for_what_is_absent():
    request = decode(f'{{{MESSAGES}, "temperature": 1, "stop": ["a"], "n": null}}'.encode(), ChatRequest)
    assert (request.temperature, request.stop, request.n, request.top_p) == (1.0, ["a"], None, None)
    assert request.messages[0].content == "Hi"


@pytest.mark.parametrize(
    "body",
    [
        "",
        " ",
        "{",
        "}",
        "nope",
        f"{{{MESSAGES}}} x",
        f"{{{MESSAGES},}}",
        f'{{{MESSAGES}, "seed": NaN}}',
        f'{{{MESSAGES}, "temperature": Infinity}}',
        f'{{{MESSAGES}, "n": 1.}}',
        f'{{{MESSAGES}, "user": "\\ud800"}}',
        f'{{{MESSAGES}, "user": "\\ud800 and more after it"}}',
        f'{{{MESSAGES}, "user": "\ud800"}}',
        f'{{{MESSAGES}, "user": "a\nb"}}',
        f"\ufeff{{{MESSAGES}}}",
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b"\x00",
        f'{{{MESSAGES}, "store": {"[" * 40_000}',
        f'{{{MESSAGES}, "store": {"[" * 40_000 + "]" * 40_000}}}',
        f'{{"messages": [{{"role": "user", "content": {"[" * 40_000}',
    ],
    ids=range(20),
)
def test_what_is_not_json_is_invalid_json(body):
    assert refused(body).code == "invalid_json"


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (f'{{{MESSAGES}, "tool_choice": "none", "tools": [{"[[]]," * 25_000}[]]}}', ChatRequest),
        (f'{{"prompt": [{"[]," * 50_000}[]]}}', CompletionRequest),
        (f'{{"prompt": ["\\\\", {"[]," * 50_000}"\\""]}}', CompletionRequest),
        (f'{{{MESSAGES}, "metadata": {{"a": {"[" * 50_001}', ChatRequest),
    ],
    ids=["tools", "prompts", "escapes", "broken"],
)
def test_more_arrays_and_objects_than_any_request_needs_are_not_even_read(body, kind, monkeypatch):
    monkeypatch.setattr("msgspec.json.decode", lambda *given, **options: pytest.fail("it was read"))
    error = refused(body, kind)
    assert (error.code, "arrays and objects; legal: at most 50000" in str(error)) == ("invalid_json", True)


def test_brackets_in_texts_are_texts():
    for text in ("[{" * 60_000, '["\\"]' * 60_000, '\\\\"[' * 60_000, "\\" * 60_000 + "[{" * 60_000):
        assert decode(json.dumps({"prompt": text, "user": text}).encode(), CompletionRequest).prompt == text
    texts = ["[", '"{', "\\"] * 60_000
    assert decode(json.dumps({"prompt": texts}).encode(), CompletionRequest).prompt == texts


VALUES = st.recursive(
    st.text('"\\[]{}a', max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('"\\[{', max_size=3), inner, max_size=3),
    max_leaves=20,
)


def number_of(value):
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return isinstance(value, (dict, list)) + sum(map(number_of, inside))


@given(value=VALUES, piece=st.integers(1, 20))
def test_brackets_are_counted_as_a_parser_does(value, piece):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "MOST_BRACKETS", -1)
        patch.setattr(decoding, "_PIECE", piece)
        error = refused(json.dumps(value).encode())
    assert str(error).startswith(f"the body has {number_of(value)} arrays and objects")


def test_an_empty_body_is_refused_as_empty():
    assert "empty" in str(refused(b""))


@pytest.mark.parametrize(
    ("body", "code", "param", "words"),
    [
        ("[]", "invalid_type", None, "the body is an array; legal: an object"),
        ("null", "invalid_type", None, "the body is null; legal: an object"),
        ("{}", "invalid_value", "messages", "messages is missing"),
        ('{"messages": {}}', "invalid_type", "messages", "messages is an object; legal: an array"),
        ('{"messages": ["a"]}', "invalid_type", "messages[0]", "messages[0] is a string; legal: an object"),
        ('{"messages": [{"content": "a"}]}', "invalid_value", "messages[0].role", "messages[0].role is missing"),
        (
            '{"messages": [{"role": "user", "content": 5}]}',
            "invalid_type",
            "messages[0].content",
            "messages[0].content is an integer; legal: a string or an array or null",
        ),
        (f'{{{MESSAGES}, "n": "2"}}', "invalid_type", "n", "n is a string; legal: an integer or null"),
        (f'{{{MESSAGES}, "n": true}}', "invalid_type", "n", "n is true or false; legal: an integer or null"),
        (f'{{{MESSAGES}, "max_tokens": 1.5}}', "invalid_type", "max_tokens", "max_tokens is a number"),
        (f'{{{MESSAGES}, "stop": ["a", 1]}}', "invalid_type", "stop[1]", "stop[1] is an integer; legal: a string"),
        (f'{{{MESSAGES}, "logit_bias": {{"5": "x"}}}}', "invalid_type", "logit_bias", "logit_bias is a string"),
        (f'{{{MESSAGES}, "temperature": 1e999}}', "invalid_value", "temperature", "out of range"),
        (f'{{{MESSAGES}, "temperature": {"9" * 1000}}}', "invalid_value", "temperature", "out of range"),
        (f'{{{MESSAGES}, "n": {"9" * 9000}}}', "invalid_value", "n", "out of range"),
        (f'{{{MESSAGES}, "store": [1, {{"a": 1e999}}]}}', "invalid_value", "store[1]", "out of range"),
        (
            f'{{{MESSAGES}, "store": {"[" * 300}1e999{"]" * 300}}}',
            "invalid_value",
            "store[0][0][0]",
            "out of range",
        ),
    ],
)
def test_a_wrong_field_is_named_as_openai_names_it(body, code, param, words):
    error = refused(body)
    assert (error.code, error.param) == (code, param)
    assert words in str(error)


@pytest.mark.parametrize(
    ("body", "param", "near"),
    [
        (f'{{{MESSAGES}, "temprature": 1}}', "temprature", "temperature"),
        (f'{{{MESSAGES}, "max_new_tokens": 1}}', "max_new_tokens", "max_tokens"),
        (f'{{{MESSAGES}, "stop_sequences": []}}', "stop_sequences", "stop"),
        (f'{{{MESSAGES}, "prompt": "a"}}', "prompt", None),
        (f'{{{MESSAGES}, "": 1}}', "", None),
        (f'{{{MESSAGES}, "stream_options": {{"usage": true}}}}', "stream_options.usage", "include_usage"),
        ('{"messages": [{"role": "user", "contents": "a"}]}', "messages[0].contents", "content"),
        (
            f'{{{MESSAGES}, "response_format": {{"type": "text", "schema": 1}}}}',
            "response_format.schema",
            "json_schema",
        ),
        (f'{{{MESSAGES}, "bomb": {"[" * 40_000}', "bomb", None),
    ],
)
def test_an_unknown_field_is_refused_with_the_nearest_legal_one(body, param, near):
    error = refused(body)
    assert (error.code, error.param) == ("unknown_parameter", param)
    assert str(error).endswith(f"nearest legal field is {near}" if near else "")


@pytest.mark.parametrize("name", ["q" * 3_000_000, "\\u0000" * 100_000, "x` - at `$." + "y" * 100_000, "` - at `$"])
def test_a_field_s_name_of_any_length_and_letters_is_shown_in_short(name):
    error = refused(f'{{{MESSAGES}, "{name}": 1}}')
    assert error.code in ("unknown_parameter", "invalid_value")
    assert len(error.body) < 3000


def test_of_a_name_that_comes_twice_the_last_value_counts():
    assert decode(f'{{{MESSAGES}, "n": 1, "n": 2}}'.encode(), ChatRequest).n == 2


def test_integers_of_a_thousand_digits_are_read():
    """Their range is checked with the field."""
    assert decode(b'{"max_tokens": ' + b"9" * 1000 + b"}", CompletionRequest).max_tokens == int("9" * 1000)


def test_a_body_is_refused_from_any_depth_of_the_stack():
    def deeper(times: int) -> ApiError:
        return deeper(times - 1) if times else refused(f'{{{MESSAGES}, "store": {"[" * 100_000}')

    assert deeper(sys.getrecursionlimit() // 2).code == "invalid_json"
