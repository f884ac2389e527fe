"""Bytes between and after the chunks of a body, on real sockets: ignored, bounded, and never a second answer."""

from __future__ import annotations

import gc
import weakref
from contextlib import suppress

import pytest

from fastllama.serve.protocol import PIECE
from tests.serve.connections import GET, answered, error_in, read_all, running, wait_for

HEAD = b"POST %s HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
ENDLESS = {
    "trailers": (b"0\r\n", b"x: yyyy\r\n"),
    "one trailer": (b"0\r\nx: ", b"y"),
    "a trailer's name": (b"0\r\n", b"y"),
    "a chunk extension": (b"1;x=", b"y"),
    "a last chunk's extension": (b"0;x=", b"y"),
}
endless = pytest.mark.parametrize(("start", "unit"), ENDLESS.values(), ids=ENDLESS)


@pytest.mark.parametrize("path", [b"/ok", b"/refuse"])
def test_trailers_are_ignored(path: bytes) -> None:
    trailers = b"Authorization: Bearer x\r\nHost: b\r\nx: y\r\nConnection: upgrade\r\nUpgrade: h2c\r\n"
    body = b"3\r\nabc\r\n0\r\n" + trailers + b"\r\n"
    with running() as server, server.connect(HEAD % path + body) as client:
        assert answered(client).endswith({b"/ok": b"3", b"/refuse": b"refused"}[path])
        assert server.application.headers == {b"host": b"a", b"transfer-encoding": b"chunked"}
        client.sendall(GET)
        assert answered(client).startswith(b"HTTP/1.1 200")


@endless
def test_what_is_no_body_has_the_limit_of_headers(start: bytes, unit: bytes) -> None:
    with running() as server, server.connect(HEAD % b"/ok" + b"3\r\nabc\r\n" + start) as client:
        with suppress(OSError):
            client.sendall(unit * ((65536 + 2 * PIECE) // len(unit)))
        assert error_in(read_all(client)) == (431, "headers_too_large")
        assert server.application.num_left == 0


@endless
def test_after_an_answer_nothing_more_is_sent(start: bytes, unit: bytes) -> None:
    with running(discard_seconds=1000) as server, server.connect(HEAD % b"/refuse" + start) as client:
        assert answered(client).endswith(b"refused")
        with suppress(OSError):
            client.sendall(unit * ((65536 + 2 * PIECE) // len(unit)))
        assert client.recv(1000) == b""


def test_a_refused_body_that_breaks_off_gets_no_second_answer() -> None:
    with running(discard_seconds=1000) as server:
        with server.connect(HEAD % b"/refuse") as client:
            assert answered(client).endswith(b"refused")
            client.sendall(b"zz\r\n")
            assert client.recv(1000) == b""
        with server.connect(HEAD % b"/refuse" + b"zz\r\n") as client:
            assert read_all(client).count(b"HTTP/1.1") == 1
        assert server.noted == []


def test_extensions_and_trailers_below_the_limit_are_read_over() -> None:
    chunk = b"1;" + b"y" * 60000 + b"\r\nx\r\n"
    with running() as server, server.connect(HEAD % b"/ok" + chunk * 3 + b"0\r\n") as client:
        client.sendall((b"x: " + b"y" * 997 + b"\r\n") * 55 + b"\r\n")
        assert answered(client).endswith(b"\r\n\r\n3")


HEADS = {
    "an answer": GET,
    "a refused body": HEAD % b"/refuse",
    "half a head": b"GET /ok HTTP/1.1\r\nHost: a\r\nx: ",
    "a long head": b"GET /ok HTTP/1.1\r\nHost: a\r\nx: " + b"y" * 70_000 + b"\r\n\r\n",
    "a body that breaks off": HEAD % b"/ok" + b"zz\r\n",
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_the_memory_of_a_connection_ends_with_it(head: bytes) -> None:
    gc.disable()
    try:
        with running(linger_seconds=1000) as server:
            client = server.connect(head)
            if head.endswith(b"\r\n"):
                answered(client)
            else:
                wait_for(lambda: any(each._reads_headers for each in server.server.server_state.connections))
            connection = weakref.ref(next(iter(server.server.server_state.connections)))
            client.close()
            wait_for(lambda: connection() is None and server.application.body() is None)
    finally:
        gc.enable()
