"""Errors of the API: their JSON, and the mapping from exceptions of the runtime."""

from __future__ import annotations

import json
from collections.abc import Mapping

from fastllama.errors import QueueFullError, shown

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
}
_ONCE = {"x-should-retry": "false"}  # the request itself fails: OpenAI's clients would retry it twice


class ClientGoneError(Exception):
    """The client has disconnected."""


class ApiError(Exception):
    """An error response in the form of OpenAI's API.

    status: of HTTP. `code`: machine-readable, such as "model_not_found". param: the wrong field, such as
    "messages[0].content"; None if there is none. headers: extra response headers, in lower case.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = dict(headers or {})

    @property
    def body(self) -> bytes:
        """The JSON body: {"error": {"message", "type", "param", "code"}}."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}, ensure_ascii=False).encode("utf-8", "replace")


def invalid(message: str, param: str | None = None, *, code: str = "invalid_value") -> ApiError:
    """Returns an error 400, for what the client has to change."""
    return ApiError(400, code, message, param=param)


def context_length_exceeded(max_model_len: int, what: str, param: str) -> ApiError:
    """Returns the error for a prompt that leaves no room for an answer; what: "messages has 5000 tokens"."""
    # Clients recognize this error by its first words, which are OpenAI's, or by its `code`.
    message = (
        f"This model's maximum context length is {max_model_len} tokens, and {what}; legal: at most "
        f"{max_model_len - 1} tokens, which leaves room for one token of the answer"
    )
    return invalid(message, param, code="context_length_exceeded")


def unavailable(code: str, message: str, *, seconds: int) -> ApiError:
    """Returns an error 503, worth retrying; `code`: "loading", "shutting_down" or "engine_down"."""
    return ApiError(503, code, message, headers={"retry-after": str(seconds)})


def deadline_exceeded() -> ApiError:
    """Returns the error for a request that ran longer than the server allows."""
    message = "the request ran longer than this server's --request-timeout; ask for fewer tokens"
    return ApiError(504, "deadline_exceeded", message, headers=_ONCE)


def from_exception(error: BaseException) -> ApiError:
    """Returns the API error for an exception raised while running a request."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(429, "queue_full", f"the server is busy: {error}", headers={"retry-after": "1"})
    if isinstance(error, (ValueError, TypeError)):  # rejected by the engine before anything was queued
        return invalid(shown(error, 500))
    return ApiError(500, "engine_error", shown(error, 500), headers=_ONCE)
