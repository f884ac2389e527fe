"""An HTTP client over raw sockets, which can break a request at any byte."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from dataclasses import dataclass, field
from typing import Any

END = b"0\r\n\r\n"  # of a chunked body


def request(body: bytes, path: str = "/v1/completions", *, method: str = "POST", headers: str = "") -> bytes:
    """A whole request. headers: further ones, each with its line end."""
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{headers}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def dechunked(body: bytes) -> bytes:
    """The content of a chunked body."""
    content, place = [], 0
    while True:
        line = body.index(b"\r\n", place)
        size = int(body[place:line], 16)
        if not size:
            return b"".join(content)
        content.append(body[line + 2 : line + 2 + size])
        place = line + size + 4


@dataclass(frozen=True)
class Reply:
    """A whole answer. times: of the reads that brought its body, by time.perf_counter."""

    status: int
    headers: dict[str, str]
    body: bytes
    times: list[float] = field(default_factory=list)

    @property
    def events(self) -> list[Any]:
        """The JSON of a stream's events, without its last line, data: [DONE]."""
        lines = self.body.split(b"\n\n")
        return [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]


class Connection:
    """One connection to a port of the loopback, as a context manager that closes it.

    receive_buffer: bytes that the kernel buffers unread; None is its default.
    """

    def __init__(self, port: int, receive_buffer: int | None = None) -> None:
        self._port = port
        self._socket = socket.socket()
        self._socket.setblocking(False)
        if receive_buffer is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)

    async def __aenter__(self) -> Connection:
        await asyncio.get_running_loop().sock_connect(self._socket, ("127.0.0.1", self._port))
        return self

    async def __aexit__(self, *error: object) -> None:
        self._socket.close()

    async def send(self, data: bytes) -> None:
        """Send all of it. Raises OSError if the server has closed."""
        await asyncio.get_running_loop().sock_sendall(self._socket, data)

    async def receive(self) -> bytes:
        """Receive the next bytes; empty if the server has closed."""
        try:
            return await asyncio.get_running_loop().sock_recv(self._socket, 65536)
        except ConnectionError:
            return b""

    def peek(self) -> bytes:
        """The first received bytes, which stay unread."""
        try:
            return self._socket.recv(64, socket.MSG_PEEK)
        except OSError:  # nothing yet, or a reset
            return b""

    async def reply(self) -> Reply | None:
        """The next answer; None if the server closes before its end."""
        data, times = b"", []
        while b"\r\n\r\n" not in data:
            read = await self.receive()
            if not read:
                return None
            data += read
        head, _, first = data.partition(b"\r\n\r\n")
        status, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        chunked = "chunked" in headers.get("transfer-encoding", "")
        parts, length = [first], len(first)
        if first:
            times.append(time.perf_counter())
        while not (parts[-1].endswith(END) if chunked else length >= int(headers.get("content-length", 0))):
            read = await self.receive()
            if not read:
                return None
            times.append(time.perf_counter())
            parts.append(read)
            length += len(read)
        body = b"".join(parts)
        return Reply(int(status.split()[1]), headers, dechunked(body) if chunked else body, times)

    def reset(self) -> None:
        """Close with a reset."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()

    def end_writing(self) -> None:
        """Close one direction: nothing more is sent."""
        self._socket.shutdown(socket.SHUT_WR)
