"""The access log: one line of JSON for each request, without what was asked or answered."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from typing import Any, TextIO

from fastllama.errors import shown

logger = logging.getLogger("fastllama")

CLIENT_LEFT = 499  # nginx's status of a request whose client closed the connection before the answer ended


@dataclass(kw_only=True)
class AccessRecord:
    """What the access log says of one request; None is written as null.

    time: of its arrival, in Unix seconds. key: the name of its API key, empty without. model: which one answers.
    user: a hash of whom the client names. status: of HTTP; 499 where the client left. reason: the finish reasons of
    its samples, or the code of its error. queue_s, first_token_s, total_s: seconds from its arrival until it began,
    until its first token, and until its end.
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
    """Writes records to a text stream, each at once. A stream that fails costs lines, and no request.

    A pipe whose reader is alive and does not read stops the event loop, as every print would.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._fails = False

    def write(self, record: AccessRecord) -> None:
        """Write one line of ASCII. Raises nothing that the stream raises; the first failure in a row is logged."""
        line = json.dumps({name: _plain(name, getattr(record, name)) for name in _FIELDS}, separators=(",", ":"))
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            if not self._fails:
                logger.warning("lines of the access log are lost: %s", error)
            self._fails = True
        else:
            self._fails = False


def _plain(name: str, value: Any) -> Any:
    """A field as JSON holds it: names that clients choose are short, and show their control characters as escapes."""
    if name == "time":
        return datetime.fromtimestamp(value, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    if isinstance(value, str):
        return shown(value)
    return round(value, 6) if isinstance(value, float) else value
