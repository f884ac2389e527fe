"""The access log: one JSON line per request, without prompts and answers."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from typing import Any, TextIO

from fastllama.errors import shown

logger = logging.getLogger("fastllama")

CLIENT_LEFT = 499  # nginx's status for a request whose client closed the connection early


@dataclass(kw_only=True)
class AccessRecord:
    """The access log's entry for one request; None is written as null.

    time: of arrival, in Unix seconds. key: name of the API key, empty without keys. model: the served model. user: a
    hash of the user that the client names. status: of HTTP; 499 if the client disconnected. reason: the samples' finish
    reasons, or the error code. queue_s, first_token_s, total_s: seconds from arrival until it was scheduled, until its
    first token, and until its end.
    """

    time: float = field(default_factory=time.time)
    id: str
    route: str
    status: int = 0
    key: str = ""
    model: str | None = None
    user: str | None = None
    reason: str | None = None
    stream: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    queue_s: float | None = None
    first_token_s: float | None = None
    total_s: float = 0.0


_FIELDS = tuple(each.name for each in fields(AccessRecord))


class AccessLog:
    """Writes records to a text stream, flushing each. If the stream fails, lines are lost, but no request.

    A pipe whose reader is alive but does not read blocks the event loop, as any print would.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._fails = False

    def write(self, record: AccessRecord) -> None:
        """Write one line of ASCII. Never raises an error of the stream; logs the first failure in a row."""
        line = json.dumps({name: _plain(name, getattr(record, name)) for name in _FIELDS}, separators=(",", ":"))
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            if not self._fails:
                logger.warning("cannot write to the access log, lines are lost: %s", error)
            self._fails = True
        else:
            self._fails = False


def _plain(name: str, value: Any) -> Any:
    """Returns a field's JSON value; strings chosen by clients are shortened, with control characters escaped."""
    if name == "time":
        return datetime.fromtimestamp(value, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    if isinstance(value, str):
        return shown(value)
    return round(value, 6) if isinstance(value, float) else value
