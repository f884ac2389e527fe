"""uvicorn's HTTP/1.1 with limits: no client holds a connection, or memory, by sending or reading too slowly.

Requests that are sent while one is answered (pipelined) are not read: the connection closes behind the answer, and the
client sends them again. So the loss of a connection is always seen by the request that it is about.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Any
from uuid import uuid4

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from fastllama.errors import counted
from fastllama.serve.errors import ApiError, unavailable


class LimitedProtocol(HttpToolsProtocol):
    """One connection. Config.limit_concurrency is how many there may be; those beyond it get a 503.

    header_seconds: from the first byte of a request to the last of its headers. idle_seconds: between requests, and
    before the first. discard_seconds: for the rest of a body that was refused. stall_seconds: for the client to take
    what was written. linger_seconds: after a refusal, for the client to read it and close.
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
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._most_connections, self.limit_concurrency = self.limit_concurrency, None
        self._timer: asyncio.TimerHandle | None = None  # of what the connection waits for from its client
        self._stall: asyncio.TimerHandle | None = None
        self._num_header_bytes: int | None = None  # of the headers that are being read; None between them
        self._refusal: ApiError | None = None  # what the parser's callbacks refuse
        self._closes = False  # behind the body that is being read
        self._is_deaf = False  # reads on, to see the connection end, and forgets what it reads

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=1, low=0)  # anything unsent is unread; with 0, TLS waits for ever
        self._wait_for_request()
        if self._most_connections is not None and len(self.connections) > self._most_connections:
            self._refuse(unavailable("too_many_connections", "this server has no connection left", seconds=5))

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timer()
        self._cancel_stall()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # answered as if it had not been asked for, as RFC 9110 lets a server
        except httptools.HttpParserError:
            if not self._is_deaf:
                self._refuse(self._refusal or ApiError(400, "invalid_http", "this is no HTTP/1.1 request"))
            return
        if self._num_header_bytes is not None:
            self._num_header_bytes += len(data)
            if self._num_header_bytes > self.header_bytes:
                self._refuse(self._too_long())

    def on_message_begin(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive, self._is_deaf = False, True
            raise RuntimeError("a pipelined request")  # leaves feed_data
        super().on_message_begin()
        self._num_header_bytes = 0
        self._start_timer(self.header_seconds, self._header_late)

    def on_headers_complete(self) -> None:
        length = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if length > self.header_bytes:
            self._refusal = self._too_long()
            raise RuntimeError("headers that are too long")
        self._num_header_bytes = None
        self._cancel_timer()
        super().on_headers_complete()
        self.cycle.transport = _AnswerTransport(self)  # type: ignore[assignment]

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if self.cycle.response_complete:  # the rest of a body that was refused
            self.cycle.more_body = False
            if self._closes:
                self.transport.close()
            else:
                self._wait_for_request()

    def close_behind_answer(self) -> None:
        """Close once the body was read: closed with bytes unread, the connection is reset and the answer is lost."""
        if self.cycle.response_complete and self.cycle.more_body:
            self._closes = True
        else:
            self.transport.close()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._unset_keepalive_if_required()  # ours is not stopped by a blank line
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
        """End the connection and forget what is unsent, which the kernel would keep for minutes."""
        if (connection := self.transport.get_extra_info("socket")) is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
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
        return ApiError(431, "headers_too_large", f"the headers are longer than {self.header_bytes} bytes")

    def _refuse(self, error: ApiError) -> None:
        """Answer what never becomes a request, and close."""
        self._is_deaf = True
        self._cancel_timer()
        if self.cycle is not None and not self.cycle.response_complete:  # within a body: whoever reads it sees its end
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.cycle.response_started:
                self.transport.close()  # within an answer nothing can be said
                return
        fields = {"content-type": "application/json", "content-length": str(len(error.body)), "connection": "close"}
        fields["x-request-id"] = uuid4().hex
        lines = [f"{name}: {value}\r\n".encode("latin-1") for name, value in (fields | error.headers).items()]
        self.transport.write(b"".join((STATUS_LINE[error.status], *lines, b"\r\n", error.body)))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._start_timer(self.linger_seconds, self.transport.close)  # closed with bytes unread, it would be reset


class _AnswerTransport:
    """What an answer is written to."""

    def __init__(self, protocol: LimitedProtocol) -> None:
        transport = protocol.transport
        self.write, self.is_closing, self.close = transport.write, transport.is_closing, protocol.close_behind_answer
