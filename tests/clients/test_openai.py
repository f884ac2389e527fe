"""OpenAI's own current package: streams beside whole answers, fields, errors."""

from __future__ import annotations

from typing import Any

import pytest

from tests.clients.conftest import HERE, Client, last_json

NUM_STREAMS = 48


def test_48_streams_at_once_match_whole_answers(client: Client) -> None:
    got = last_json(client("now", HERE / "scripts" / "openai_streams.py"))
    for name in ("whole_chats", "whole_completions"):
        assert len(set(got[name])) > 8, "the answers are too much alike for mixed-up streams to show"
    assert got["threaded_chats"] == got["whole_chats"]
    assert got["async_chats"] == got["whole_chats"]
    assert got["async_completions"] == got["whole_completions"]
    assert len(got["async_tokens"]) == NUM_STREAMS
    assert all(0 < count <= 32 for count in got["async_tokens"])


@pytest.fixture
def fields(client: Client) -> Any:
    return last_json(client("now", HERE / "scripts" / "openai_fields.py"))


def test_fields_and_errors_are_read_by_openais_types(fields: Any) -> None:
    assert fields["raised"] == {
        "unknown": ["BadRequestError", "unknown_parameter", "no_such_field"],
        "too_hot": ["BadRequestError", "invalid_value", "temperature"],
        "too_long": ["BadRequestError", "context_length_exceeded", "messages"],
        "tools": ["BadRequestError", "unsupported_parameter", "tools"],
        "embeddings": ["NotFoundError", "unknown_url", None],
    }
    assert fields["models"] == ["tiny"]
    assert fields["several"] == fields["again"]
    assert len(set(fields["several"])) == 3
    assert len(set(fields["fingerprints"])) == 1
    spelled = bytes(fields["likely_bytes"]).decode()
    assert fields["likely"]
    assert spelled.strip() == fields["likely"].strip()
    assert fields["likely_best"]
    assert set(fields["likely_tops"]) == {3}
    assert fields["stopped"][1] == "stop"
    assert "." not in fields["stopped"][0]


def test_an_echo_of_several_prompts_is_numbered_prompt_by_prompt(fields: Any) -> None:
    assert [index for index, _, _ in fields["echo"]] == [0, 1, 2, 3]
    for index, text, logprobs in fields["echo"]:
        prompt = ["Once upon", "The fox"][index // 2]
        assert text.startswith(prompt)
        assert logprobs["token_logprobs"][0] is None
        assert all(logprob <= 0 for logprob in logprobs["token_logprobs"][1:])
        assert {len(column) for column in logprobs.values()} == {len(logprobs["tokens"])}
        assert logprobs["text_offset"][-2] == len(prompt)  # two tokens were sampled
        for token, offset in list(zip(logprobs["tokens"], logprobs["text_offset"], strict=True))[2:]:
            assert text[offset:].startswith(token)
    assert fields["usage"]["completion_tokens"] == 8
