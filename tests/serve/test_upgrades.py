"""Requests that ask for another protocol, on real sockets: answered as if they had not, with their bodies."""

from __future__ import annotations

import pytest

from tests.serve.connections import GET, answered, error_in, read_all, running, wait_for

HEAD = b"POST %s HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMA\r\n"
FRAMED = {
    "a length": HEAD + b"Content-Length: %d\r\n\r\n%s",
    "chunks": HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n",
}
framed = pytest.mark.parametrize("framed", FRAMED.values(), ids=FRAMED)


@pytest.mark.parametrize("kind", [b"websocket", b"h2c"])
def test_an_upgrade_is_answered_as_if_none_had_been_asked_for(kind: bytes) -> None:
    upgrade = b"GET /ok HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: %s\r\nx: y\r\n\r\n" % kind
    with running() as server, server.connect(upgrade) as client:
        for _ in range(2):
            answer = answered(client)
            assert answer.startswith(b"HTTP/1.1 200")
            assert b"close" not in answer
            assert server.application.headers == {b"host": b"a", b"connection": b"Upgrade", b"x": b"y"}
            client.sendall(upgrade)
        assert answered(client).startswith(b"HTTP/1.1 200")


@framed
@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_the_body_of_an_upgrade_is_read(framed: bytes, piece: int) -> None:
    data = framed % (b"/ok", 300, b"x" * 300)
    with running() as server, server.connect() as client:
        for start in range(0, len(data), piece):
            client.sendall(data[start : start + piece])
        assert answered(client).endswith(b"\r\n\r\n300")
        client.sendall(GET)
        assert answered(client).startswith(b"HTTP/1.1 200")


@framed
@pytest.mark.parametrize("at_once", [True, False])
def test_a_body_that_looks_like_a_request_is_a_body(framed: bytes, at_once: bool) -> None:
    data = framed % (b"/ok", len(GET), GET)
    with running() as server, server.connect() as client:
        head, _, body = data.partition(b"\r\n\r\n")
        if at_once:
            client.sendall(data)
        else:
            client.sendall(head + b"\r\n\r\n")
            client.sendall(body)
        assert answered(client).endswith(b"\r\n\r\n%d" % len(GET))
        client.sendall(b"POST /ok HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
        assert read_all(client).endswith(b"\r\n\r\n0")


@framed
def test_requests_after_an_upgrade_are_pipelined_ones(framed: bytes) -> None:
    with running() as server, server.connect(framed % (b"/wait", 3, b"abc") + GET) as client:
        wait_for(lambda: server.application.num_waiting == 1)
        server.application.may_end = True
        assert read_all(client).count(b"HTTP/1.1 200") == 1
    with running() as server:
        client = server.connect(framed % (b"/wait", 3, b"abc") + GET)
        wait_for(lambda: server.application.num_waiting == 1)
        client.close()
        wait_for(lambda: server.application.num_left == 1)


def test_an_upgrade_has_the_limits_of_other_requests() -> None:
    upgrade = b"GET /ok HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nx: " + b"a" * 65536 + b"\r\n\r\n"
    with running() as server, server.connect(upgrade) as client:
        assert error_in(read_all(client)) == (431, "headers_too_large")
    with running(idle_seconds=1) as server, server.connect(upgrade.replace(b"a" * 65536, b"a" * 60000)) as client:
        assert read_all(client).count(b"HTTP/1.1 200") == 1


@pytest.mark.parametrize("target", [b"example.org:80", b"/ok", b"http://a/ok"])
def test_a_tunnel_is_refused(target: bytes) -> None:
    with running() as server, server.connect(b"CONNECT %s HTTP/1.1\r\nHost: a\r\n\r\n" % target + GET) as client:
        assert error_in(read_all(client)) == (400, "invalid_http")
