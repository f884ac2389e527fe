"""Bodies on their way in, answers on their way out, whole or as server-sent events; both end when the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from starlette.types import Receive, Scope, Send

from fastllama.errors import brief, counted
from fastllama.serve.errors import ApiError, ClientGoneError, unavailable
from fastllama.serve.service import Service, ServiceLimits

T = TypeVar("T")
PIECE = 65536
PING = b": ping\n\n"
JSON = "application/json"
EVENTS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store",
    "x-accel-buffering": "no",  # nginx would gather events
}


def header_of(scope: Scope, name: bytes) -> str | None:
    """A header of the request, the first of this name; None without."""
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value).decode("latin-1")
    return None


def check_json(scope: Scope, limits: ServiceLimits) -> None:
    """Raise ApiError 415 for a body that is not declared as JSON, 413 for one declared longer than the limit."""
    given = header_of(scope, b"content-type")
    if (given or "").partition(";")[0].strip().lower() != JSON:
        what = "no content-type" if given is None else f"content-type {brief(given)}"
        raise ApiError(415, "unsupported_media_type", f"the request has {what}; legal: {JSON}")
    encoding = header_of(scope, b"content-encoding")
    if encoding is not None and encoding.strip().lower() != "identity":
        raise ApiError(415, "unsupported_media_type", f"content-encoding is {brief(encoding)}; legal: none")
    length = header_of(scope, b"content-length")
    if length is not None and (len(length) > 18 or int(length) > limits.body_bytes):
        raise _too_large(limits)


async def read_body(receive: Receive, service: Service) -> bytes:
    """The whole body; of one that is cut short as the service closes, what has come.

    Raises ApiError 413 and 408 for one that is too long or too slow, 503 where too many come at once, ClientGoneError.
    """
    body = bytearray()
    try:
        return await _read_body(receive, service, body)
    finally:
        service.num_uploading_bytes -= len(body)


async def _read_body(receive: Receive, service: Service, body: bytearray) -> bytes:
    """Into `body`, whose bytes are counted as they come."""
    limits, closing = service.limits, service.closing
    loop = asyncio.get_running_loop()
    end = loop.time() + limits.body_seconds
    while True:
        task = asyncio.ensure_future(receive())
        try:
            await asyncio.wait((task, closing), timeout=end - loop.time(), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                if closing.done():
                    return bytes(body)
                message = f"the body did not come within {counted(round(limits.body_seconds), 'second')}"
                raise ApiError(408, "request_timeout", message, headers={"connection": "close"})
        finally:
            task.cancel()
        message_ = task.result()
        if message_["type"] == "http.disconnect":
            raise ClientGoneError
        piece = message_.get("body", b"")
        body += piece
        service.num_uploading_bytes += len(piece)
        if len(body) > limits.body_bytes:
            raise _too_large(limits)
        if service.num_uploading_bytes > limits.all_bodies_bytes:
            raise unavailable("too_many_uploads", "other bodies fill this server's memory; try again", seconds=5)
        if not message_.get("more_body", False):
            return bytes(body)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run this, which is cancelled as soon as the client leaves: ClientGoneError. What of a body is unread is lost."""
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def respond(send: Send, status: int, body: bytes, headers: Mapping[str, str], content_type: str = JSON) -> None:
    """Send a whole response, in pieces: how far a reader has come with what lies in TLS's buffer nobody can see."""
    fields = {"content-type": content_type, "content-length": str(len(body))} | dict(headers)
    await send({"type": "http.response.start", "status": status, "headers": encoded(fields)})
    for start in range(0, max(1, len(body)), PIECE):
        end = start + PIECE
        await send({"type": "http.response.body", "body": body[start:end], "more_body": end < len(body)})
        if end < len(body):
            await asyncio.sleep(0)  # in which a client that left is seen


def encoded(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """Headers as ASGI takes them."""
    return [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in headers.items()]


class EventStream:
    """A response of server-sent events: one write for each `send`."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._clock = asyncio.get_running_loop().time
        self._last = self._clock()

    async def send(self, events: bytes) -> None:
        """Events, each with its empty line."""
        await self._send({"type": "http.response.body", "body": events, "more_body": True})
        self._last = self._clock()

    async def _ping(self, seconds: float) -> None:
        while True:
            await asyncio.sleep(max(0.0, self._last + seconds - self._clock()))
            if self._clock() >= self._last + seconds:
                await self.send(PING)

    @classmethod
    @asynccontextmanager
    async def open(cls, send: Send, headers: Mapping[str, str], ping_seconds: float) -> AsyncIterator[EventStream]:
        """Begins the response, and within sends a comment whenever nothing else was sent for so long."""
        await send({"type": "http.response.start", "status": 200, "headers": encoded(EVENTS | dict(headers))})
        stream = cls(send)
        ping = asyncio.ensure_future(stream._ping(ping_seconds))
        try:
            yield stream
        finally:
            ping.cancel()

    async def end(self, events: bytes) -> None:
        """The last events."""
        await self._send({"type": "http.response.body", "body": events, "more_body": False})


def _too_large(limits: ServiceLimits) -> ApiError:
    message = f"the body is longer than {limits.body_bytes} bytes, which is this server's --max-body-bytes"
    return ApiError(413, "body_too_large", message)
