"""Sockets of a server: bound before anything takes long, on addresses that only this machine reaches unless asked."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import sys
from contextlib import suppress

RESERVED = 128  # descriptors for what is no connection: files, libraries, connections that are about to be refused
BACKLOG = 2048  # connections that wait to be accepted, which Linux cuts to net.core.somaxconn

# Bytes of a connection's send buffer in the kernel, which it doubles. Left alone it grows to 4 MB, of which a third has
# to be read before a slow reader is seen to read at all.
SEND_BUFFER = 131072


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int) -> list[socket.socket]:
    """A socket for each address of a host, all on one port; port 0: a free one. They listen: nobody else gets the port.

    Raises ValueError where the host has no address here, or the port is taken or needs more rights.
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
    """Where a server is reached."""
    name = f"[{host}]" if ":" in host else host
    return f"{'https' if tls else 'http'}://{name}:{sockets[0].getsockname()[1]}"


def most_connections() -> int | None:
    """How many connections there may be, once the limit of open files is as high as it may go; None for no limit."""
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
        if os.name == "posix":  # elsewhere it would share a port that is taken
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)  # connections inherit it
        found.bind(address)
        found.listen(BACKLOG)  # bound alone, a port can be had twice
    except BaseException:
        found.close()
        raise
    return found


def _why(error: OSError, host: str) -> str:
    if error.errno == errno.EADDRINUSE:
        return "another program has that port; legal for --port: a free one, or 0 to choose it"
    if error.errno == errno.EACCES:
        return "that port needs more rights; legal for --port: 1024 to 65535, or 0 for a free one"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{host} is no address of this machine"
    return error.strerror or str(error)
