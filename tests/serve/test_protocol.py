"""The limits of a connection, on real sockets: what is too long, too slow, too much, or no HTTP at all."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from fastllama.serve.protocol import LimitedProtocol
from fastllama.serve.responses import respond
from fastllama.serve.sockets import bind
from tests.serve.live import certificate

BIG = 64 << 20  # more than the kernel's buffers of two sockets hold
GET = b"GET /ok HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Application:
    """Answers /ok at once, /wait when it may, and everything that reads a body with its length; counts who left."""

    def __init__(self) -> None:
        self.num_left = self.num_waiting = 0
        self.may_end = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/refuse":
            await respond(send, 413, b"refused", {})
            return
        length, more = 0, True
        while more:
            message = await receive()
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
        await respond(send, 200, b"x" * BIG if scope["path"] == "/big" else str(length).encode(), {})


class Running:
    """A server on its own thread."""

    def __init__(
        self,
        application: Application,
        protocol: type[LimitedProtocol],
        loop: str,
        most: int | None,
        certificate: tuple[Path, Path] | None,
    ) -> None:
        self.application = application
        chain, key = certificate or (None, None)
        self._tls = None if chain is None else ssl.create_default_context(cafile=str(chain))
        config = uvicorn.Config(
            application,
            http=protocol,
            loop=loop,  # type: ignore[arg-type]
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
def running(
    loop: str = "asyncio", *, most: int | None = None, tls: tuple[Path, Path] | None = None, **limits: float
) -> Iterator[Running]:
    """A server with these limits; at its end no connection may be left that its client has closed."""
    found = Running(Application(), type("Hurried", (LimitedProtocol,), limits), loop, most, tls)
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


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "tls"])
def tls(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path] | None:
    """A certificate and its key, or None for a connection that is not encrypted."""
    return certificate(tmp_path_factory.mktemp("tls")) if request.param else None


both_loops = pytest.mark.parametrize("loop", ["asyncio", "uvloop"])


@both_loops
def test_a_connection_is_kept_for_requests_one_after_the_other(loop: str, tls: tuple[Path, Path] | None) -> None:
    with running(loop, tls=tls) as server, server.connect() as client:
        for number in range(3):
            body = b"x" * number
            client.sendall(b"POST /ok HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (number, body))
            assert answered(client).endswith(b"\r\n\r\n%d" % number)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),  # TLS
        b"hello\r\n\r\n",
        b"GET /ok HTTP/9.9\r\n\r\n",
        b"GET  HTTP/1.1\r\n\r\n",
        b"POST /ok HTTP/1.1\r\nContent-Length: 1e9\r\n\r\n",
        b"POST /ok HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /ok HTTP/1.1\r\nContent-Length: " + b"9" * 1000 + b"\r\n\r\n",
        b"POST /ok HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /ok HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        b"POST /ok HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /ok HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET /ok HTTP/1.1\r\nx: a\x00b\r\n\r\n",
        b"CONNECT example.org:80 HTTP/1.1\r\n\r\n",
        bytes(range(256)) * 8,
    ],
    ids=range(14),
)
def test_what_is_no_request_gets_one_error_and_no_log(data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with running() as server, server.connect(data) as client:
        assert error_in(read_all(client)) == (400, "invalid_http")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("piece", [1000, 300_000])
@pytest.mark.parametrize("ends", [False, True])
def test_headers_are_not_read_beyond_their_limit(piece: int, ends: bool) -> None:
    with running() as server, server.connect(b"GET /ok HTTP/1.1\r\nx: ") as client:
        sent = 0
        try:
            while sent < 300_000:
                client.sendall(b"a" * piece)
                sent += piece
            client.sendall(b"\r\n\r\n" if ends else b"a")
        except OSError:  # it has closed already
            pass
        assert error_in(read_all(client)) == (431, "headers_too_large")


def test_headers_that_come_in_one_piece_have_the_same_limit() -> None:
    with running() as server, server.connect(b"GET /ok HTTP/1.1\r\nx: " + b"a" * 65536 + b"\r\n\r\n") as client:
        assert error_in(read_all(client)) == (431, "headers_too_large")


@both_loops
def test_any_byte_that_is_not_sent_counts_as_unread(loop: str, tls: tuple[Path, Path] | None) -> None:
    with running(loop, tls=tls) as server, server.connect(GET) as client:
        answered(client)
        (connection,) = server.server.server_state.connections
        assert connection.transport.get_write_buffer_limits() == (0, 1)


def test_headers_up_to_their_limit_are_read() -> None:
    with running() as server, server.connect(b"GET /ok HTTP/1.1\r\nx: " + b"a" * 65000 + b"\r\n\r\n") as client:
        assert answered(client).startswith(b"HTTP/1.1 200")


@both_loops
def test_headers_that_do_not_end_in_time_are_given_up(loop: str) -> None:
    with running(loop, header_seconds=0.1) as server, server.connect(b"GET /ok HTTP/1.1\r\nHost: a\r\n") as client:
        assert error_in(read_all(client)) == (408, "request_timeout")
    with running(loop, header_seconds=0.1) as server, server.connect(GET) as client:
        answered(client)
        client.sendall(b"G")  # the next one, too
        assert error_in(read_all(client)) == (408, "request_timeout")


def test_drops_of_headers_do_not_buy_time() -> None:
    with running(header_seconds=0.3) as server, server.connect() as client:
        answer = b""
        client.settimeout(0.02)
        for letter in b"GET /ok HTTP/1.1\r\n" + b"x: y\r\n" * 1000:
            try:
                client.sendall(bytes([letter]))
                answer = client.recv(4096)
            except TimeoutError:
                continue
            break
        client.settimeout(60)
        assert error_in(answer + read_all(client)) == (408, "request_timeout")


@both_loops
@pytest.mark.parametrize("first", [b"", GET, b"\r\n"], ids=["never sends", "between two", "a blank line"])
def test_an_idle_connection_is_closed(loop: str, first: bytes) -> None:
    with running(loop, idle_seconds=0.2) as server, server.connect(first) as client:
        assert read_all(client).count(b"HTTP/1.1 200") == (first == GET)
        wait_for(lambda: server.num_connections == 0)


def test_a_request_that_runs_is_not_idle() -> None:
    limits = dict.fromkeys(("idle_seconds", "header_seconds", "stall_seconds", "discard_seconds"), 0.05)
    with running(**limits) as server, server.connect(b"GET /wait HTTP/1.1\r\n\r\n") as client:
        wait_for(lambda: server.application.num_waiting == 1)
        time.sleep(0.3)
        server.application.may_end = True
        assert answered(client).startswith(b"HTTP/1.1 200")


@both_loops
def test_a_reader_that_stalls_is_dropped_and_what_answered_it_ends(loop: str, tls: tuple[Path, Path] | None) -> None:
    with (
        running(loop, tls=tls, stall_seconds=0.2) as server,
        server.connect(b"GET /big HTTP/1.1\r\n\r\n", buffer=4096) as client,
    ):
        wait_for(lambda: server.num_connections == 1)
        wait_for(lambda: server.num_connections == 0 and not server.server.server_state.tasks)
        with nullcontext() if tls else pytest.raises(ConnectionResetError):  # which Python's TLS takes for an end
            assert len(read_all(client)) < BIG  # what lay in the kernel's buffers


@both_loops
def test_a_reader_that_is_slow_gets_everything(loop: str, tls: tuple[Path, Path] | None) -> None:
    with (
        running(loop, tls=tls, stall_seconds=0.5) as server,
        server.connect(b"GET /big HTTP/1.1\r\nConnection: close\r\n\r\n") as client,
    ):
        size, end = 0, time.monotonic() + 2  # four times the limit
        while data := client.recv(1 << 16):
            size += len(data)
            if time.monotonic() < end:
                time.sleep(0.01)
        assert size > BIG


def test_the_rest_of_a_refused_body_is_read_so_that_the_refusal_arrives() -> None:
    with running() as server, server.connect(b"POST /refuse HTTP/1.1\r\nContent-Length: 10000000\r\n\r\n") as client:
        for _ in range(100):
            client.sendall(b"x" * 100_000)
        assert answered(client).endswith(b"refused")
        client.sendall(GET)
        assert answered(client).startswith(b"HTTP/1.1 200")


def test_a_refusal_arrives_although_its_connection_closes() -> None:
    head = b"POST /refuse HTTP/1.1\r\nConnection: close\r\nContent-Length: 10000000\r\n\r\n"
    with running() as server, server.connect(head) as client:
        for _ in range(100):
            client.sendall(b"x" * 100_000)
        answer = read_all(client)
        assert answer.endswith(b"refused")
        assert b"connection: close" in answer


def test_the_rest_of_a_refused_body_has_a_limit_of_time() -> None:
    post = b"POST /refuse HTTP/1.1\r\nContent-Length: 10000000\r\n\r\n"
    with running(discard_seconds=0.2) as server, server.connect(post) as client:
        assert read_all(client).endswith(b"refused")


def test_a_body_that_breaks_off_is_told_so_and_whoever_reads_it_sees_its_end() -> None:
    post = b"POST /ok HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nzz\r\n"
    with running(linger_seconds=1000) as server, server.connect(post) as client:
        assert error_in(read_all(client)) == (400, "invalid_http")
        wait_for(lambda: server.application.num_left == 1)  # before the connection is closed


@both_loops
def test_one_connection_more_than_there_may_be_is_refused(loop: str) -> None:
    with running(loop, most=2) as server:
        first, second = server.connect(), server.connect()
        wait_for(lambda: server.num_connections == 2)
        with server.connect(GET) as third:
            assert error_in(read_all(third)) == (503, "too_many_connections")
        first.sendall(GET)
        assert answered(first).startswith(b"HTTP/1.1 200")
        first.close()
        wait_for(lambda: server.num_connections == 1)
        with server.connect(GET) as third:
            assert answered(third).startswith(b"HTTP/1.1 200")
        second.close()


@both_loops
def test_the_end_of_a_connection_is_seen_behind_requests_that_were_sent_ahead(loop: str) -> None:
    with running(loop) as server:
        client = server.connect(b"GET /wait HTTP/1.1\r\n\r\n" + GET * 3)
        wait_for(lambda: server.application.num_waiting == 1)
        client.sendall(GET)
        client.close()
        wait_for(lambda: server.application.num_left == 1)
    with running(loop) as server, server.connect(b"GET /wait HTTP/1.1\r\n\r\n" + GET) as client:
        wait_for(lambda: server.application.num_waiting == 1)
        server.application.may_end = True
        assert read_all(client).count(b"HTTP/1.1 200") == 1  # the second is sent again, on a new connection


@both_loops
@pytest.mark.parametrize("reset", [False, True])
def test_the_end_of_a_connection_is_seen_by_what_answers_it(loop: str, reset: bool) -> None:
    with running(loop) as server:
        client = server.connect(b"GET /wait HTTP/1.1\r\n\r\n")
        wait_for(lambda: server.application.num_waiting == 1)
        if reset:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        client.close()
        wait_for(lambda: server.application.num_left == 1)


def test_an_upgrade_is_answered_as_if_none_had_been_asked_for() -> None:
    upgrade = b"GET /ok HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n"
    for kind in (b"websocket", b"h2c"):
        with running() as server, server.connect(upgrade % kind) as client:
            assert answered(client).startswith(b"HTTP/1.1 200")
