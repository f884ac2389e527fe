"""Requests that no client should send, over real sockets: each gets one error in OpenAI's form, none a traceback."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serve.asgi import COMPLETION
from tests.serve.live import LIMIT, LiveServer, live, wait_for

POSTS = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")
GETS = ("/v1/models", "/v1/models/tiny", "/version", "/health", "/ready", "/metrics", "/", "/page.js")


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live("--max-body-bytes", "1000000") as server:
        yield server
        assert server.post("/v1/completions", COMPLETION).status_code == 200
        wait_for(server.is_idle)
        assert "Traceback" not in server.printed
        assert server.printed.count("\n") == 3  # of the start


def ask(server: LiveServer, data: bytes) -> tuple[int, bytes, bytes]:
    """Status, headers in lower case, and body of the answer, after which the server closes."""
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=LIMIT) as client:
        client.sendall(data)
        found = b""
        while got := client.recv(65536):
            found += got
    head, _, body = found.partition(b"\r\n\r\n")
    return int(head.split()[1]), head.lower(), body


def check(answer: tuple[int, bytes, bytes], *, is_head: bool = False) -> None:
    status, head, body = answer
    assert status < 500
    if status >= 400 and not is_head:
        assert b"content-type: application/json" in head
        error = json.loads(body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert "\n" not in error["message"]
        assert len(error["message"]) < 2000
        error["message"].encode()


def post(server: LiveServer, path: str, body: bytes, *headers: bytes) -> tuple[int, bytes, bytes]:
    fields = [b"Host: localhost", b"Content-Type: application/json", b"Connection: close", *headers]
    length = b"Content-Length: %d" % len(body)
    return ask(server, b"\r\n".join([f"POST {path} HTTP/1.1".encode(), *fields, length, b"", body]))


DIGITS = b"1" + b"0" * 1000
BODIES = {
    "nothing": b"",
    "brackets": b"[" * 100_000,
    "objects": b'{"a":' * 100_000,
    "brackets in an unknown field": b'{"prompt": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "brackets in metadata": b'{"prompt": "a", "metadata": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "infinity": b'{"prompt": "a", "temperature": 1e999}',
    "a number of a thousand digits": b'{"prompt": "a", "max_tokens": ' + DIGITS + b"}",
    "a seed of a thousand digits": b'{"prompt": "a", "seed": -' + DIGITS + b"}",
    "a bias of a thousand digits": b'{"prompt": "a", "logit_bias": {"' + DIGITS + b'": 1}}',
    "ids of a thousand digits": b'{"prompt": [' + DIGITS + b"]}",
    "tokens of a thousand digits": b'{"tokens": [' + DIGITS + b"]}",
    "a lone surrogate": b'{"prompt": "\\ud800"}',
    "a lone surrogate in a name": b'{"\\udfff": 1}',
    "no UTF-8": b'{"prompt": "\xff"}',
    "a mark of order": b'\xef\xbb\xbf{"prompt": "a"}',
    "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
    "a NUL": b'{"prompt": "a"}\x00',
    "a field of half a megabyte": b'{"' + b"x" * 500_000 + b'": 1}',
    "two fields of one name": b'{"prompt": "a", "prompt": 3}',
    "a list": b"[]",
    "null": b"null",
    "a prompt that cannot fit": b'{"prompt": "' + b"a" * 900_000 + b'"}',
}


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_body_that_no_client_should_send_is_the_clients_fault(server: LiveServer, path: str, body: bytes) -> None:
    answer = post(server, path, body)
    check(answer)
    assert answer[0] == 400 or path in ("/tokenize", "/detokenize", "/v1/completions")


@pytest.mark.parametrize("path", POSTS)
def test_a_body_above_the_limit_is_refused_though_it_is_sent(server: LiveServer, path: str) -> None:
    answer = post(server, path, b" " * 1_000_001)
    check(answer)
    assert answer[0] == 413


token = st.sampled_from(["x", "authorization", "host", "accept", "origin", "x-request-id", "content-type", "expect"])
value = st.one_of(
    st.sampled_from(["", "Bearer", "Bearer x", "localhost", "*", "application/json; charset=utf-16", "100-continue"]),
    st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=200),
)
method = st.sampled_from(["GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE"])
path = st.one_of(
    st.sampled_from(POSTS + GETS),
    st.text(st.sampled_from("/v1%20%2f%00%ff..?&=;tiny"), max_size=30).map(lambda text: f"/{text}"),
)


@settings(max_examples=300)
@given(method, path, st.lists(st.tuples(token, value), max_size=4), st.binary(max_size=100))
def test_any_request_is_answered_and_nothing_is_the_servers_fault(
    server: LiveServer, method: str, path: str, headers: list[tuple[str, str]], body: bytes
) -> None:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {given}" for name, given in headers]
    data = "\r\n".join([*lines, "", ""]).encode("latin-1") + body
    check(ask(server, data), is_head=method == "HEAD")


@settings(max_examples=200)
@given(st.binary(min_size=1, max_size=300), st.integers(0, 200))
def test_damaged_requests_are_answered(server: LiveServer, noise: bytes, place: int) -> None:
    """Bytes put into a request that is right."""
    whole = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    whole += b'Connection: close\r\nContent-Length: 15\r\n\r\n{"prompt": "a"}'
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=LIMIT) as client:
        client.sendall(whole[:place] + noise + whole[place:])
        client.shutdown(socket.SHUT_WR)  # whatever it still waits for does not come
        found = b""
        while got := client.recv(65536):
            found += got
    assert found == b"" or found.startswith((b"HTTP/1.1 2", b"HTTP/1.1 4"))


def test_a_body_that_breaks_off_is_logged_and_counted_as_it_was_answered(server: LiveServer) -> None:
    head = (
        b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    counted = 'fastllama:http_requests_total{route="%s",status="400"} '
    for data, route in (
        (head % b"/tokenize" + b"5\r\nhello\r\nzz\r\n", "/tokenize"),
        (head % b"/v1/completions" + b"5\r\nhello\r\nzz\r\n", "/v1/completions"),
        (b"hello\r\n\r\n", "other"),
    ):
        before = number_after(counted % route, server.get("/metrics").text)
        answer = ask(server, data)
        check(answer)
        assert answer[0] == 400
        assert b'"code": "invalid_http"' in answer[2]
        given = answer[1].partition(b"x-request-id: ")[2].partition(b"\r\n")[0].decode()
        wait_for(lambda given=given: given in server.logged)  # type: ignore[misc]
        (line,) = (json.loads(line) for line in server.logged.splitlines() if given in line)
        assert (line["route"], line["status"], line["reason"]) == (route, 400, "invalid_http")
        assert number_after(counted % route, server.get("/metrics").text) == before + 1


def number_after(name: str, text: str) -> float:
    """The value of a metric, which may not be there yet."""
    return float((text.partition(name)[2] or "0").split("\n")[0])
