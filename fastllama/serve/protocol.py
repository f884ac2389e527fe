"""uvicorn's HTTP/1.1 with limits, so that no client holds a connection or memory by sending or reading slowly.

Pipelined requests are not read: the connection closes after the current response, and the client resends them. So a
lost connection is always noticed by the request that it concerns.

Trailers and requests for another protocol (Upgrade) are read and ignored, as RFC 9110 allows (6.5.1, 7.8).
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from fastllama.errors import counted
from fastllama.serve.errors import ApiError, unavailable
from fastllama.serve.exchange import Exchange

if TYPE_CHECKING:
    from uvicorn._types import ASGIReceiveEvent, ASGISendEvent

_LINGER = "hh" if os.name == "nt" else "ii"  # C's struct linger: on, and for how many seconds
PIECE = 4096  # bytes passed to the parser at a time, to count those between two of its callbacks


class LimitedProtocol(HttpToolsProtocol):
    """One connection. Config.limit_concurrency is the most connections; further ones get a 503.

    note: called with requests that are refused here, before the application. If a body breaks off, its request's
    receive() raises the ApiError.

    header_bytes: of the headers of a request; also of chunk extensions and trailers between or after pieces of its
    body, in steps of PIECE.
    header_seconds: from the first byte of a request to the last of its headers. idle_seconds: between requests, and
    before the first. discard_seconds: for the rest of a rejected body. stall_seconds: for the client to read what was
    written. linger_seconds: after a refusal, for the client to read it and close.
    """

    header_bytes = 65536
    header_seconds = 10.0
    idle_seconds = 120.0
    discard_seconds = 60.0
    stall_seconds = 60.0
    linger_seconds = 2.0

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        note: Callable[[Exchange], None] = lambda exchange: None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._note = note
        self._most_connections, self.limit_concurrency = self.limit_concurrency, None
        self._timer: asyncio.TimerHandle | None = None  # for what the client has to send next
        self._stall: asyncio.TimerHandle | None = None
        self._reads_headers = False  # other fields are trailers
        self._num_bytes = 0  # since the headers began or ended, or the last piece of a body
        self._closes = False  # after the body being read
        self._is_deaf = False  # discards all input, and only waits for the connection to end

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=1, low=0)  # pause if anything is unsent; with 0, TLS hangs
        self._wait_for_request()
        if self._most_connections is not None and len(self.connections) > self._most_connections:
            self._refuse(unavailable("too_many_connections", "this server has no connection left", seconds=5))

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timer()
        self._cancel_stall()
        super().connection_lost(exc)
        if isinstance(self.cycle, _Cycle):
            self.cycle.transport = self.transport
            if self.cycle.refusal is not None:
                self.cycle.refusal.__traceback__ = None  # its frames hold the body
        self.parser = self.headers = self.scope = None  # type: ignore[assignment]  # freed without garbage collection

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), PIECE):
            self._read(data[start : start + PIECE])

    def _read(self, data: bytes) -> None:
        if self._is_deaf or self.transport.is_closing():
            return
        self._num_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._read(self._head_without_upgrade())
            self._read(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            if not self._is_deaf:
                self._refuse(_raised_by_callback(error) or _invalid("this is no HTTP/1.1 request"))
        else:
            if self._num_bytes > self.header_bytes:
                self._refuse(self._too_long())

    def _head_without_upgrade(self) -> bytes:
        """Returns the last request head without the Upgrade header, after which the parser accepts no body."""
        first = b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        fields = [b"%s: %s" % field for field in self.headers if field[0] != b"upgrade"]
        return b"\r\n".join([first, *fields, b"", b""])

    def on_message_begin(self) -> None:
        if self.cycle is not None and (not self.cycle.response_complete or self.transport.is_closing()):
            self.cycle.keep_alive, self._is_deaf = False, True
            raise RuntimeError("a pipelined request")  # leaves feed_data
        super().on_message_begin()
        self._num_bytes, self._reads_headers = 0, True
        self._start_timer(self.header_seconds, self._header_late)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._reads_headers:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Raises ApiError, which leaves feed_data."""
        length = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if length > self.header_bytes:
            raise self._too_long()
        num_hosts = sum(name == b"host" for name, _ in self.headers)
        if num_hosts > 1 or (not num_hosts and self.parser.get_http_version() != "1.0"):  # RFC 9112, 3.2
            raise _invalid(f"the request has {num_hosts} Host headers; legal: one")
        if self.parser.get_method() == b"CONNECT":
            raise _invalid("the method is CONNECT; this server is no proxy")
        if self.parser.should_upgrade():
            return  # the head is read once more
        self._num_bytes, self._reads_headers = 0, False
        self._cancel_timer()
        super().on_headers_complete()
        self.cycle.__class__ = _Cycle
        self.cycle.transport = _AnswerTransport(self)  # type: ignore[assignment]

    def on_body(self, body: bytes) -> None:
        self._num_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        super().on_message_complete()
        if self.cycle.response_complete:  # the rest of a rejected body
            self.cycle.more_body = False
            if self._closes:
                self.transport.close()
            else:
                self._wait_for_request()

    def close_behind_answer(self) -> None:
        """Close after the body is read: if closed with unread bytes, the connection is reset and the answer lost."""
        if not (self.cycle.response_complete and self.cycle.more_body):
            self.transport.close()
        elif self._is_deaf:  # the body has broken off
            self._hang_up()
        else:
            self._closes = True

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._unset_keepalive_if_required()  # our idle timer replaces uvicorn's, which a blank line would stop
        if self._is_deaf:
            return  # already closing
        if self.cycle.more_body:
            self._start_timer(self.discard_seconds, self.transport.close)
        else:
            self._wait_for_request()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self.loop.call_later(self.stall_seconds, self._reset)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel_stall()

    def _reset(self) -> None:
        """Reset the connection and drop unsent data, which the kernel would keep for minutes."""
        if (connection := self.transport.get_extra_info("socket")) is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack(_LINGER, 1, 0))
        self.transport.abort()

    def _wait_for_request(self) -> None:
        self._start_timer(self.idle_seconds, self.transport.close)

    def _start_timer(self, seconds: float, act: Any) -> None:
        self._cancel_timer()
        self._timer = self.loop.call_later(seconds, act)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _cancel_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _header_late(self) -> None:
        seconds = counted(round(self.header_seconds), "second")
        self._refuse(ApiError(408, "request_timeout", f"the headers did not come within {seconds}"))

    def _too_long(self) -> ApiError:
        return ApiError(431, "headers_too_large", f"headers or trailers are longer than {self.header_bytes} bytes")

    def _refuse(self, error: ApiError) -> None:
        """Answer with an error and close; a request being read or answered ends itself."""
        self._is_deaf = True
        cycle = self.cycle
        if cycle is not None and (cycle.more_body or not cycle.response_complete):
            cycle.keep_alive = False
            if cycle.response_complete:
                self._hang_up()
            elif cycle.more_body:
                assert isinstance(cycle, _Cycle)
                cycle.refusal = error
                cycle.message_event.set()
            return
        self._cancel_timer()
        exchange = Exchange(uuid4().hex, "other", status=error.status, error=error.code)
        self._note(exchange)
        fields = {"content-type": "application/json", "content-length": str(len(error.body)), "connection": "close"}
        fields["x-request-id"] = exchange.request_id
        lines = [f"{name}: {value}\r\n".encode("latin-1") for name, value in (fields | error.headers).items()]
        self.transport.write(b"".join((STATUS_LINE[error.status], *lines, b"\r\n", error.body)))
        self._hang_up()

    def _hang_up(self) -> None:
        """Close after the client has read the answer: if closed with unread bytes, the connection would be reset."""
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._start_timer(self.linger_seconds, self.transport.close)


class _Cycle(RequestResponseCycle):
    """A request whose body may break off, with responses that HTTP/1.0 can frame."""

    refusal: ApiError | None = None  # of the rest of the body
    is_unframed = False

    async def receive(self) -> ASGIReceiveEvent:
        message = await super().receive()
        if self.refusal is not None and message["type"] != "http.disconnect":
            raise self.refusal
        return message

    async def send(self, message: ASGISendEvent) -> None:
        if self.scope["http_version"] == "1.0":
            while self.flow.write_paused and not self.disconnected:
                await self.flow.drain()
            self._unframe(message)  # nothing may be sent between this and the message
        await super().send(message)

    def _unframe(self, message: ASGISendEvent) -> None:
        """End a body of unknown length by closing the connection, as HTTP/1.0 needs; uvicorn would send it unframed."""
        if message["type"] == "http.response.start":
            if all(name != b"content-length" for name, _ in message.get("headers", ())):
                self.chunked_encoding = False
                self.is_unframed = True
        elif message["type"] == "http.response.body" and self.is_unframed:
            self.expected_content_length = len(message.get("body", b""))


class _AnswerTransport:
    """The transport of a response, which closes only after the request's body is read."""

    def __init__(self, protocol: LimitedProtocol) -> None:
        transport = protocol.transport
        self.write, self.is_closing, self.close = transport.write, transport.is_closing, protocol.close_behind_answer


def _invalid(message: str) -> ApiError:
    return ApiError(400, "invalid_http", message)


def _raised_by_callback(error: httptools.HttpParserError) -> ApiError | None:
    """Returns the ApiError that a callback raised. A function: a local variable would keep the connection's memory."""
    return error.__context__ if isinstance(error.__context__, ApiError) else None
