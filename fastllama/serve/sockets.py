"""Listening sockets of a server, bound before the model is loaded; loopback by default."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import sys
from contextlib import suppress

RESERVED = 128  # file descriptors for files, libraries, and connections about to be refused
BACKLOG = 2048  # connections waiting to be accepted; Linux caps it at net.core.somaxconn

# Bytes of a connection's send buffer; the kernel doubles it. By default it grows to 4 MB, of which a third must be read
# before a slow reader is noticed to read at all.
SEND_BUFFER = 131072


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int) -> list[socket.socket]:
    """Returns listening sockets for all addresses of a host, on one port; port 0 chooses a free one.

    Raises ValueError if the host has no address here, or the port is taken or privileged.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--host is {host!r}: {error}; legal: an address or name of this machine") from None
    sockets: list[socket.socket] = []
    failure: OSError | None = None
    for family, kind, protocol, _, address in dict.fromkeys(found):
        own_port = sockets[0].getsockname()[1] if sockets else port
        try:
            sockets.append(_bound(family, kind, protocol, (address[0], own_port, *address[2:])))
        except OSError as error:
            failure = error
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):  # localhost is ::1 too, even without IPv6
                break
    if failure is not None and (not sockets or failure.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)):
        for each in sockets:
            each.close()
        raise ValueError(f"{host}:{port} cannot be served: {_why(failure, host)}") from None
    return sockets


def url_of(host: str, sockets: list[socket.socket], *, tls: bool) -> str:
    """Returns the server's URL."""
    name = f"[{host}]" if ":" in host else host
    return f"{'https' if tls else 'http'}://{name}:{sockets[0].getsockname()[1]}"


def most_connections() -> int | None:
    """Returns the most connections, after raising the limit of open files to its maximum; None for no limit."""
    if sys.platform == "win32":
        return None
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return None if soft == resource.RLIM_INFINITY else max(16, soft - RESERVED)


def _bound(family: int, kind: int, protocol: int, address: tuple[object, ...]) -> socket.socket:
    found = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere it would share a port already taken
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)  # connections inherit it
        found.bind(address)
        found.listen(BACKLOG)  # bound but not listening, a port can be bound twice
    except BaseException:
        found.close()
        raise
    return found


def _why(error: OSError, host: str) -> str:
    if error.errno == errno.EADDRINUSE:
        return "another program has that port; legal for --port: a free one, or 0 to choose it"
    if error.errno == errno.EACCES:
        return "that port needs more privileges; legal for --port: 1024 to 65535, or 0 for a free one"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{host} is not an address of this machine"
    return error.strerror or str(error)
