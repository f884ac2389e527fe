"""Errors of the API: the JSON that OpenAI's clients read, and the error of each exception of the runtime."""

from __future__ import annotations

import json

import pytest

from fastllama.errors import QueueFullError, RequestError
from fastllama.serve.errors import (
    ApiError,
    context_length_exceeded,
    deadline_exceeded,
    from_exception,
    invalid,
    unavailable,
)


def caused(cause: Exception) -> RequestError:
    error = RequestError("request 7 failed")
    error.__cause__ = cause
    return error


def test_the_body_is_openai_s_object():
    assert json.loads(invalid("n is 0; legal: 1 to 4", "n").body) == {
        "error": {
            "message": "n is 0; legal: 1 to 4",
            "type": "invalid_request_error",
            "param": "n",
            "code": "invalid_value",
        }
    }


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "invalid_request_error"),
        (413, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "server_error"),
        (503, "server_error"),
        (504, "server_error"),
    ],
)
def test_each_status_has_openai_s_type(status, kind):
    assert json.loads(ApiError(status, "some_code", "words").body)["error"]["type"] == kind


def test_a_message_with_lone_surrogates_is_still_utf8():
    assert json.loads(ApiError(400, "c", "a\ud800b").body)["error"]["message"] == "a?b"


def test_a_context_that_is_exceeded_begins_with_openai_s_words_and_gives_both_numbers():
    error = context_length_exceeded(4096, "messages has 5000 tokens", "messages")
    assert (error.status, error.code, error.param) == (400, "context_length_exceeded", "messages")
    assert str(error).startswith("This model's maximum context length is 4096 tokens")
    assert "5000" in str(error)


def test_what_may_succeed_later_has_a_retry_time():
    assert unavailable("loading", "still loading", seconds=5).headers == {"retry-after": "5"}
    full = from_exception(QueueFullError("100 requests wait"))
    assert (full.status, full.code, full.headers["retry-after"]) == (429, "queue_full", "1")


@pytest.mark.parametrize(
    "error", [deadline_exceeded(), from_exception(RuntimeError("NaN"))], ids=["deadline", "engine"]
)
def test_what_would_fail_again_asks_clients_not_to_retry(error):
    assert error.status >= 500
    assert error.headers["x-should-retry"] == "false"


def test_an_api_error_stays_what_it_is():
    error = invalid("no")
    assert from_exception(error) is error


@pytest.mark.parametrize("cause", [ValueError("n is 9"), TypeError("n is a text")])
def test_what_the_engine_refuses_is_the_client_s_to_change_and_what_it_raises_later_is_not(cause):
    error = from_exception(cause)
    assert (error.status, str(error)) == (400, str(cause))
    assert from_exception(caused(cause)).status == 500


def test_any_other_failure_is_the_engine_s_in_one_line():
    error = from_exception(RequestError("request 7 failed: out\nof memory " + "x" * 5000))
    assert (error.status, error.code) == (500, "engine_error")
    assert str(error).isprintable()
    assert len(str(error)) < 1000
