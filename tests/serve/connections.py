"""A server on a thread of its own, whose protocol hands requests to a small application, and clients on raw sockets."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn

from fastllama.serve.errors import ApiError
from fastllama.serve.exchange import Exchange
from fastllama.serve.protocol import LimitedProtocol
from fastllama.serve.responses import respond
from fastllama.serve.sockets import bind

BIG = 64 << 20  # more than the kernel's buffers of two sockets hold
GET = b"GET /ok HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Body:
    pass


class Application:
    """Answers /ok at once, /wait on a signal, and requests that read a body with its length; counts clients that left.

    /stream has two pieces and no length. headers, body: of the request that came last; body stands for what a frame of
    the application holds while it reads.
    """

    def __init__(self) -> None:
        self.num_left = self.num_waiting = 0
        self.may_end = False
        self.headers: dict[bytes, bytes] = {}
        self.body: Callable[[], Body | None] = lambda: None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.headers = dict(scope["headers"])
        try:
            await self._answer(scope, receive, send)
        except ApiError as error:
            await respond(send, error.status, error.body, {"x-request-id": "given"})

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/refuse":
            await respond(send, 413, b"refused", {})
            return
        length, more = 0, True
        body = Body()
        self.body = weakref.ref(body)
        while more:
            task = asyncio.ensure_future(receive())  # as read_body does
            await asyncio.wait((task,))
            message = task.result()
            if message["type"] == "http.disconnect":
                self.num_left += 1
                return
            length, more = length + len(message["body"]), message["more_body"]
        if scope["path"] == "/wait":
            left = asyncio.ensure_future(receive())
            self.num_waiting += 1
            while not self.may_end and not left.done():
                await asyncio.sleep(0.005)
            if left.done():
                self.num_left += 1
                return
            left.cancel()
        if scope["path"] == "/stream":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"one, ", "more_body": True})
            await send({"type": "http.response.body", "body": b"two", "more_body": False})
            return
        await respond(send, 200, b"x" * BIG if scope["path"] == "/big" else str(length).encode(), {})


class Running:
    """A server on its own thread."""

    def __init__(
        self,
        application: Application,
        protocol: type[LimitedProtocol],
        most: int | None,
        certificate: tuple[Path, Path] | None,
    ) -> None:
        self.application = application
        chain, key = certificate or (None, None)
        self._tls = None if chain is None else ssl.create_default_context(cafile=str(chain))
        self.noted: list[Exchange] = []
        config = uvicorn.Config(
            application,
            http=partial(protocol, note=self.noted.append),  # type: ignore[arg-type]
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            limit_concurrency=most,
            timeout_graceful_shutdown=1,
            timeout_keep_alive=0,  # uvicorn's own, which LimitedProtocol replaces
            ssl_certfile=chain,
            ssl_keyfile=key,
        )
        self.server = uvicorn.Server(config)
        (self.socket,) = bind("127.0.0.1", 0)
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))

    @property
    def num_connections(self) -> int:
        return len(self.server.server_state.connections)

    def connect(self, data: bytes = b"", *, buffer: int | None = None) -> socket.socket:
        client = socket.socket()
        if buffer is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        client.settimeout(60)
        client.connect(self.socket.getsockname())
        if self._tls is not None:
            client = self._tls.wrap_socket(client, server_hostname="localhost")
        client.sendall(data)
        return client


@contextmanager
def running(*, most: int | None = None, tls: tuple[Path, Path] | None = None, **limits: float) -> Iterator[Running]:
    """A server with these limits; at its end no connection may be left that its client has closed."""
    found = Running(Application(), type("Hurried", (LimitedProtocol,), limits), most, tls)
    found.thread.start()
    try:
        wait_for(lambda: found.server.started)
        yield found
    finally:
        found.application.may_end = True
        found.server.should_exit = True
        found.thread.join(60)
        found.socket.close()
        assert not found.thread.is_alive()


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def read_all(client: socket.socket) -> bytes:
    """Until the server closes; a reset after an answer ends it too."""
    found = b""
    while data := client.recv(1 << 20):
        found += data
    return found


def answered(client: socket.socket) -> bytes:
    """One whole answer of few bytes."""
    found = b""
    while b"\r\n\r\n" not in found:
        found += client.recv(4096)
    head, _, body = found.partition(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    while len(body) < length:
        body += client.recv(4096)
    return head + b"\r\n\r\n" + body


def error_in(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert b"connection: close" in head.lower()
    assert b"x-request-id: " in head.lower()
    return int(head.split()[1]), error["code"]
