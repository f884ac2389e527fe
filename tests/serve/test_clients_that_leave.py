"""Clients that reset, close and never finish, on real sockets: pages and descriptors come back, others go on."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.asgi import COMPLETION, ENDLESS
from tests.serve.live import LiveServer, leave, live, read_until, wait_for

COMPLETIONS = "/v1/completions"
STREAM = ENDLESS | {"stream": True}
HEAVY = STREAM | {"logprobs": 20, "n": 4, "temperature": 1}


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    """Four sequences at once, in steps of 5 ms and more."""
    with live("--max-num-seqs", "4", faults="step=0.005") as server:
        server.post(COMPLETIONS, COMPLETION)
        yield server
        assert "Traceback" not in server.printed
        assert "rror" not in server.printed


@pytest.fixture(autouse=True)
def nothing_is_left(server: LiveServer) -> Iterator[None]:
    """After each test the server holds what it held before."""
    wait_for(server.is_idle)
    before = server.num_descriptors()
    yield
    wait_for(server.is_idle)
    wait_for(lambda: server.num_descriptors() <= before)


def others_are_unhurt(server: LiveServer) -> None:
    first, second = [server.post(COMPLETIONS, COMPLETION).json()["choices"] for _ in range(2)]
    assert first == second
    assert first[0]["text"]


@pytest.mark.parametrize("reset", [False, True], ids=["close", "reset"])
@pytest.mark.parametrize("body", [ENDLESS, STREAM, HEAVY], ids=["whole", "stream", "heavy"])
def test_a_request_ends_with_its_client(server: LiveServer, body: Any, reset: bool) -> None:
    clients = [server.connect(COMPLETIONS, body) for _ in range(4)]
    if "stream" in body:
        for client in clients[:1]:
            read_until(client, b"data: ")
    wait_for(lambda: server.metric("num_requests_running") > 0)
    for client in clients:
        leave(client, reset=reset)
    wait_for(server.is_idle)
    others_are_unhurt(server)


@pytest.mark.parametrize("reset", [False, True], ids=["close", "reset"])
def test_a_request_that_waits_ends_with_its_client(server: LiveServer, reset: bool) -> None:
    running = [server.connect(COMPLETIONS, ENDLESS) for _ in range(4)]
    wait_for(lambda: server.metric("num_requests_running") == 4)
    waiting = [server.connect(COMPLETIONS, body) for body in (ENDLESS, STREAM)]
    wait_for(lambda: server.metric("num_requests_waiting") == 2)
    for client in waiting:
        leave(client, reset=reset)
    wait_for(lambda: server.metric("num_requests_waiting") == 0)
    assert server.metric("num_requests_running") == 4
    for client in running:
        leave(client, reset=reset)


@pytest.mark.parametrize("reset", [False, True], ids=["close", "reset"])
def test_an_upload_that_breaks_off_leaves_nothing(server: LiveServer, reset: bool) -> None:
    clients = [server.connect(COMPLETIONS, COMPLETION, missing=each) for each in (1, 40)]
    others_are_unhurt(server)
    for client in clients:
        leave(client, reset=reset)


def test_half_a_connection_counts_as_none(server: LiveServer) -> None:
    """A client that shuts down its side of a connection gets no answer: it looks like one that left."""
    with server.connect(COMPLETIONS, ENDLESS) as client:
        wait_for(lambda: server.metric("num_requests_running") == 1)
        client.shutdown(socket.SHUT_WR)
        wait_for(server.is_idle)
        assert client.recv(100) == b""


def test_a_client_that_takes_part_of_a_stream_and_goes_is_charged_for_in_the_log(server: LiveServer) -> None:
    client = server.connect(COMPLETIONS, STREAM)
    read_until(client, b"data: ")
    leave(client, reset=True)
    wait_for(lambda: '"status":499' in server.logged.splitlines()[-1])
    assert '"reason":"client_left"' in server.logged.splitlines()[-1]
