"""Reads request bodies and sends responses, whole or as server-sent events; both end when the client disconnects."""

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
    "x-accel-buffering": "no",  # or nginx would buffer events
}


def header_of(scope: Scope, name: bytes) -> str | None:
    """Returns the first request header of this name; None without."""
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value).decode("latin-1")
    return None


def check_json(scope: Scope, limits: ServiceLimits) -> None:
    """Raise ApiError 415 if the body is not declared as JSON, 413 if its declared length exceeds the limit."""
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
    """Returns the whole body; if the service closes meanwhile, what has arrived.

    Raises ApiError 413 if it is too long, 408 if it is too slow, 503 if other uploads fill the memory; ClientGoneError.
    """
    body = bytearray()
    try:
        return await _read_body(receive, service, body)
    finally:
        service.num_uploading_bytes -= len(body)


async def _read_body(receive: Receive, service: Service, body: bytearray) -> bytes:
    """Read into `body`, counting bytes as they arrive."""
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
    """Run a coroutine; cancel it with ClientGoneError if the client disconnects. Discards the unread body."""
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
    """Send a whole response in pieces, because progress inside TLS's buffer is invisible to the stall timeout."""
    fields = {"content-type": content_type, "content-length": str(len(body))} | dict(headers)
    await send({"type": "http.response.start", "status": status, "headers": encoded(fields)})
    for start in range(0, max(1, len(body)), PIECE):
        end = start + PIECE
        await send({"type": "http.response.body", "body": body[start:end], "more_body": end < len(body)})
        if end < len(body):
            await asyncio.sleep(0)  # lets a disconnect be noticed


def encoded(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """Returns headers as ASGI expects them."""
    return [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in headers.items()]


class EventStream:
    """A response of server-sent events; each `send` is one write."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._clock = asyncio.get_running_loop().time
        self._last = self._clock()

    async def send(self, events: bytes) -> None:
        """Send events, each with its terminating blank line."""
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
        """Starts the response; sends a comment whenever nothing was sent for ping_seconds."""
        await send({"type": "http.response.start", "status": 200, "headers": encoded(EVENTS | dict(headers))})
        stream = cls(send)
        ping = asyncio.ensure_future(stream._ping(ping_seconds))
        try:
            yield stream
        finally:
            ping.cancel()

    async def end(self, events: bytes) -> None:
        """Send the last events and end the response."""
        await self._send({"type": "http.response.body", "body": events, "more_body": False})


def _too_large(limits: ServiceLimits) -> ApiError:
    message = f"the body is longer than {limits.body_bytes} bytes, this server's --max-body-bytes"
    return ApiError(413, "body_too_large", message)
