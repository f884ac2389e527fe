"""Errors of the API: what a client reads, and what each exception of the runtime becomes."""

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
_ONCE = {"x-should-retry": "false"}  # the request itself fails: OpenAI's clients would send it twice more


class ClientGoneError(Exception):
    """Nobody reads the answer any more."""


class ApiError(Exception):
    """A request that gets no answer, in the form that OpenAI's clients read.

    status: of HTTP. code: for programs, as "model_not_found". param: the field that is wrong, as "messages[0].content",
    None where no field is. headers: beside the body, in lower case.
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
        """The JSON: {"error": {"message", "type", "param", "code"}}."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}, ensure_ascii=False).encode("utf-8", "replace")


def invalid(message: str, param: str | None = None, *, code: str = "invalid_value") -> ApiError:
    """What a client has to change."""
    return ApiError(400, code, message, param=param)


def context_length_exceeded(max_model_len: int, what: str, param: str) -> ApiError:
    """A prompt that leaves no room for an answer; what: "messages has 5000 tokens"."""
    # Clients know the case by the first words, which are OpenAI's, or by the code.
    message = (
        f"This model's maximum context length is {max_model_len} tokens, and {what}; legal: at most "
        f"{max_model_len - 1} tokens, which leave room for one of the answer"
    )
    return invalid(message, param, code="context_length_exceeded")


def unavailable(code: str, message: str, *, seconds: int) -> ApiError:
    """What may succeed elsewhere, or after some seconds; code: "loading", "shutting_down" or "engine_down"."""
    return ApiError(503, code, message, headers={"retry-after": str(seconds)})


def deadline_exceeded() -> ApiError:
    """A request that ran longer than the server lets it."""
    message = "the request ran longer than this server's --request-timeout; ask for fewer tokens"
    return ApiError(504, "deadline_exceeded", message, headers=_ONCE)


def from_exception(error: BaseException) -> ApiError:
    """What a client is told of an exception that running its request raised."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(429, "queue_full", f"the server is busy: {error}", headers={"retry-after": "1"})
    if isinstance(error, (ValueError, TypeError)):  # what the engine refuses before it queues anything
        return invalid(shown(error, 500))
    return ApiError(500, "engine_error", shown(error, 500), headers=_ONCE)
