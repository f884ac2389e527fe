"""The limits of a connection, on real sockets: requests that are too long, too slow, too many, or no HTTP at all."""

from __future__ import annotations

import logging
import socket
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.serve.connections import BIG, GET, answered, error_in, read_all, running, wait_for
from tests.serve.live import certificate, read_until


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "tls"])
def tls(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path] | None:
    """A certificate and its key, or None for a connection that is not encrypted."""
    return certificate(tmp_path_factory.mktemp("tls")) if request.param else None


def test_a_connection_is_kept_for_requests_one_after_the_other(tls: tuple[Path, Path] | None) -> None:
    with running(tls=tls) as server, server.connect() as client:
        for number in range(3):
            body = b"x" * number
            client.sendall(b"POST /ok HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s" % (number, body))
            assert answered(client).endswith(b"\r\n\r\n%d" % number)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),  # TLS
        b"hello\r\n\r\n",
        b"GET /ok HTTP/9.9\r\n\r\n",
        b"GET  HTTP/1.1\r\n\r\n",
        b"POST /ok HTTP/1.1\r\nHost: a\r\nContent-Length: 1e9\r\n\r\n",
        b"POST /ok HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST /ok HTTP/1.1\r\nHost: a\r\nContent-Length: " + b"9" * 1000 + b"\r\n\r\n",
        b"POST /ok HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /ok HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        b"POST /ok HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /ok HTTP/1.1\r\nHost: a\r\nno colon\r\n\r\n",
        b"GET /ok HTTP/1.1\r\nHost: a\r\nx: a\x00b\r\n\r\n",
        b"CONNECT example.org:80 HTTP/1.1\r\nHost: a\r\n\r\n",
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
    with running() as server, server.connect(b"GET /ok HTTP/1.1\r\nHost: a\r\nx: ") as client:
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
    with (
        running() as server,
        server.connect(b"GET /ok HTTP/1.1\r\nHost: a\r\nx: " + b"a" * 65536 + b"\r\n\r\n") as client,
    ):
        assert error_in(read_all(client)) == (431, "headers_too_large")


def test_any_byte_that_is_not_sent_counts_as_unread(tls: tuple[Path, Path] | None) -> None:
    with running(tls=tls) as server, server.connect(GET) as client:
        answered(client)
        (connection,) = server.server.server_state.connections
        assert connection.transport.get_write_buffer_limits() == (0, 1)


def test_headers_up_to_their_limit_are_read() -> None:
    with (
        running() as server,
        server.connect(b"GET /ok HTTP/1.1\r\nHost: a\r\nx: " + b"a" * 65000 + b"\r\n\r\n") as client,
    ):
        assert answered(client).startswith(b"HTTP/1.1 200")


def test_headers_that_do_not_end_in_time_are_given_up() -> None:
    with running(header_seconds=0.1) as server, server.connect(b"GET /ok HTTP/1.1\r\nHost: a\r\n") as client:
        assert error_in(read_all(client)) == (408, "request_timeout")
    with running(header_seconds=0.1) as server, server.connect(GET) as client:
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


@pytest.mark.parametrize("first", [b"", GET, b"\r\n"], ids=["never sends", "between two", "a blank line"])
def test_an_idle_connection_is_closed(first: bytes) -> None:
    with running(idle_seconds=1) as server, server.connect(first) as client:
        assert read_all(client).count(b"HTTP/1.1 200") == (first == GET)
        wait_for(lambda: server.num_connections == 0)


def test_a_request_that_runs_is_not_idle() -> None:
    limits = dict.fromkeys(("idle_seconds", "header_seconds", "stall_seconds", "discard_seconds"), 1.0)
    with running(**limits) as server, server.connect(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n") as client:
        wait_for(lambda: server.application.num_waiting == 1)
        time.sleep(1.3)
        server.application.may_end = True
        assert answered(client).startswith(b"HTTP/1.1 200")


def test_a_reader_that_stalls_is_dropped_and_what_answered_it_ends(tls: tuple[Path, Path] | None) -> None:
    with (
        running(tls=tls, stall_seconds=0.2) as server,
        server.connect(b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n", buffer=4096) as client,
    ):
        wait_for(lambda: server.num_connections == 1)
        wait_for(lambda: server.num_connections == 0 and not server.server.server_state.tasks)
        with nullcontext() if tls else pytest.raises(ConnectionResetError):  # which Python's TLS takes for an end
            assert len(read_all(client)) < BIG  # what lay in the kernel's buffers


def test_a_reader_that_is_slow_gets_everything(tls: tuple[Path, Path] | None) -> None:
    with (
        running(tls=tls, stall_seconds=1) as server,
        server.connect(b"GET /big HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n") as client,
    ):
        size, end = 0, time.monotonic() + 3  # three times the limit
        while data := client.recv(1 << 16):
            size += len(data)
            if time.monotonic() < end:
                time.sleep(0.01)
        assert size > BIG


def test_the_rest_of_a_refused_body_is_read_so_that_the_refusal_arrives() -> None:
    with (
        running() as server,
        server.connect(b"POST /refuse HTTP/1.1\r\nHost: a\r\nContent-Length: 10000000\r\n\r\n") as client,
    ):
        for _ in range(100):
            client.sendall(b"x" * 100_000)
        assert answered(client).endswith(b"refused")
        client.sendall(GET)
        assert answered(client).startswith(b"HTTP/1.1 200")


def test_a_refusal_arrives_although_its_connection_closes() -> None:
    head = b"POST /refuse HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 10000000\r\n\r\n"
    with running() as server, server.connect(head) as client:
        for _ in range(100):
            client.sendall(b"x" * 100_000)
        answer = read_all(client)
        assert answer.endswith(b"refused")
        assert b"connection: close" in answer


def test_the_rest_of_a_refused_body_has_a_limit_of_time() -> None:
    post = b"POST /refuse HTTP/1.1\r\nHost: a\r\nContent-Length: 10000000\r\n\r\n"
    with running(discard_seconds=0.2) as server, server.connect(post) as client:
        assert read_all(client).endswith(b"refused")


def test_a_body_that_breaks_off_raises_for_its_reader() -> None:
    post = b"POST /ok HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nzz\r\n"
    with running(linger_seconds=1000) as server, server.connect(post) as client:
        answer = read_all(client)
        assert error_in(answer) == (400, "invalid_http")
        assert b"x-request-id: given" in answer
        assert server.application.num_left == 0
        assert server.noted == []  # the application has


def test_one_connection_more_than_there_may_be_is_refused() -> None:
    with running(most=2) as server:
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


def test_the_end_of_a_connection_is_seen_after_requests_that_were_sent_ahead() -> None:
    with running() as server:
        client = server.connect(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n" + GET * 3)
        wait_for(lambda: server.application.num_waiting == 1)
        client.sendall(GET)
        client.close()
        wait_for(lambda: server.application.num_left == 1)
    with running() as server, server.connect(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n" + GET) as client:
        wait_for(lambda: server.application.num_waiting == 1)
        server.application.may_end = True
        assert read_all(client).count(b"HTTP/1.1 200") == 1  # the second is sent again, on a new connection


@pytest.mark.parametrize("reset", [False, True])
def test_the_end_of_a_connection_is_seen_by_what_answers_it(reset: bool) -> None:
    with running() as server:
        client = server.connect(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n")
        wait_for(lambda: server.application.num_waiting == 1)
        if reset:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        client.close()
        wait_for(lambda: server.application.num_left == 1)


def test_the_rest_of_a_refused_body_does_not_count_as_headers() -> None:
    post = b"POST /refuse HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n"
    is_sent = threading.Event()
    with running() as server:
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 200_000)  # which takes all of it at once
        with server.connect(post) as client:
            assert answered(client).endswith(b"refused")
            (connection,) = server.server.server_state.connections
            connection.loop.call_soon_threadsafe(is_sent.wait, 60)  # meanwhile nothing is read
            client.sendall(b"x" * 100_000 + GET[:-2])
            is_sent.set()
            wait_for(lambda: connection._timer is not None and not connection.cycle.more_body)
            client.sendall(GET[-2:])
            assert answered(client).startswith(b"HTTP/1.1 200")


def test_what_waits_after_a_request_does_not_end_it() -> None:
    with running() as server, server.connect(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n") as client:
        wait_for(lambda: server.application.num_waiting == 1)
        client.sendall(b"\r\n" * 50_000)
        server.application.may_end = True
        assert read_all(client).startswith(b"HTTP/1.1 200")
        assert server.noted == []


@pytest.mark.parametrize("hosts", [(), ("a", "a"), ("a", "b")], ids=len)
def test_a_request_has_one_host_header(hosts: tuple[str, ...]) -> None:
    fields = "".join(f"Host: {name}\r\n" for name in hosts).encode()
    with running() as server, server.connect(b"GET /ok HTTP/1.1\r\n" + fields + b"\r\n") as client:
        answer = read_all(client)
        assert error_in(answer) == (400, "invalid_http")
        assert b"%d Host headers" % len(hosts) in answer


def test_an_answer_to_http_1_0_ends_with_its_connection() -> None:
    for head in (b"GET /stream HTTP/1.0\r\n\r\n", b"GET /stream HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"):
        with running() as server, server.connect(head) as client:
            answer = read_all(client)
            assert answer.endswith(b"\r\n\r\none, two")
            assert b"transfer-encoding" not in answer.lower()
            assert b"connection: close" in answer
    with running() as server, server.connect(b"GET /big HTTP/1.0\r\n\r\n") as client:
        assert len(read_all(client)) > BIG
    with running() as server, server.connect(GET.replace(b"/ok", b"/stream")) as client:
        assert read_until(client, b"0\r\n\r\n").endswith(b"\r\n\r\n5\r\none, \r\n3\r\ntwo\r\n0\r\n\r\n")


def test_what_never_becomes_a_request_is_noted_under_the_id_of_its_answer() -> None:
    with running(most=1, header_seconds=1) as server:
        answers = []
        for data in (b"hello\r\n\r\n", b"GET /ok HTTP/1.1\r\nHost: a\r\nx: " + b"a" * 70000 + b"\r\n\r\n", b"GET"):
            with server.connect(data) as client:
                answers.append(read_all(client))
            wait_for(lambda: server.num_connections == 0)
        with server.connect(), server.connect() as client:
            answers.append(read_all(client))
        records = [each.record() for each in server.noted]
        assert [(each.status, each.reason, each.route) for each in records] == [
            (400, "invalid_http", "other"),
            (431, "headers_too_large", "other"),
            (408, "request_timeout", "other"),
            (503, "too_many_connections", "other"),
        ]
        for answer, record in zip(answers, records, strict=True):
            assert f"x-request-id: {record.id}\r\n".encode() in answer
