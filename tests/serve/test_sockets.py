"""Sockets: which addresses only this machine reaches, errors of binding, and the number of connections."""

from __future__ import annotations

import resource
import socket
from collections.abc import Iterator

import pytest

from fastllama.serve.sockets import RESERVED, bind, is_loopback, most_connections, url_of


@pytest.fixture
def sockets() -> Iterator[list[socket.socket]]:
    found: list[socket.socket] = []
    yield found
    for each in found:
        each.close()


@pytest.mark.parametrize(
    ("host", "is_ours"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.0.1", False),
        ("localhost.example.org", False),
        ("", False),
    ],
)
def test_only_addresses_of_the_loopback_interface_are_this_machines_own(host: str, is_ours: bool) -> None:
    assert is_loopback(host) is is_ours


def test_a_host_of_several_addresses_has_one_port(sockets: list[socket.socket]) -> None:
    sockets += bind("localhost", 0)
    port = sockets[0].getsockname()[1]
    assert port != 0
    assert {each.getsockname()[1] for each in sockets} == {port}
    assert url_of("localhost", sockets, tls=False) == f"http://localhost:{port}"
    assert url_of("::1", sockets, tls=True) == f"https://[::1]:{port}"


def test_a_port_that_is_taken_is_reported_with_its_address_and_leaves_no_socket(sockets: list[socket.socket]) -> None:
    sockets += bind("127.0.0.1", 0)
    port = sockets[0].getsockname()[1]
    with pytest.raises(ValueError, match=rf"127\.0\.0\.1:{port} cannot be served: another program has that port"):
        bind("127.0.0.1", port)


def test_a_port_that_another_program_may_have_too_is_had_by_who_listens(sockets: list[socket.socket]) -> None:
    other = socket.socket()
    other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with other:
        other.bind(("127.0.0.1", 0))
        sockets += bind("127.0.0.1", other.getsockname()[1])
        with pytest.raises(OSError, match="in use"):
            other.listen()


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1", "a" * 70])
def test_a_host_that_is_not_this_machine_is_reported(host: str) -> None:
    with pytest.raises(ValueError, match="address"):
        bind(host, 0)


def test_the_limit_of_open_files_is_raised_and_leaves_room(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [1000, 5000]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, given: limits.__setitem__(slice(None), given))
    assert most_connections() == 5000 - RESERVED
    assert limits == [5000, 5000]
    limits[:] = [256, resource.RLIM_INFINITY]
    assert most_connections() == 65536 - RESERVED
    limits[:] = [resource.RLIM_INFINITY, resource.RLIM_INFINITY]
    assert most_connections() is None

    def refuse(kind: int, given: tuple[int, int]) -> None:
        raise ValueError("not allowed")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    limits[:] = [1000, 5000]
    assert most_connections() == 1000 - RESERVED
