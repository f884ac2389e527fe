"""Reads streams of completions over HTTP at the least cost in Python: sockets, epoll, parsing afterwards.

Client and server share the machine. So while streams run, the client only stores bytes and times; it parses and checks
them after the last.
"""

from __future__ import annotations

import json
import select
import socket
import threading
import time
from collections.abc import Sequence

from benchmarks.serving.process import ServerProcess, cpu_seconds
from benchmarks.serving.requests import END, dechunked
from benchmarks.serving.samples import PAUSE, PROBE, Burst, Sample

Read = tuple[float, bytes]


class StreamingClient:
    """Keeps connections to a server from one burst to the next."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self._connections: list[socket.socket] = []

    def close(self) -> None:
        """Close all connections."""
        for connection in self._connections:
            connection.close()

    def run(self, burst: Burst) -> Sample:
        """Run one burst. Raises RuntimeError for a wrong answer."""
        requests = [self._request(prompt, burst.tokens) for prompt in burst.prompts]
        while len(self._connections) < burst.streams:
            connection = socket.create_connection(("127.0.0.1", self._server.port))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._connections.append(connection)
        probes: list[float] = []
        ended = threading.Event()
        probing = threading.Thread(target=self._probe, args=(ended, probes))
        used, own = cpu_seconds(self._server.pid), time.process_time()
        start = time.perf_counter()
        if burst.probed:
            probing.start()
        reads = _read(self._connections[: burst.streams], requests)
        seconds = time.perf_counter() - start
        used, own = cpu_seconds(self._server.pid) - used, time.process_time() - own
        if burst.probed:
            ended.set()
            probing.join()
        arrivals, tokens = zip(*(_parsed(each) for each in reads), strict=True)
        if set(tokens) != {burst.tokens}:
            raise RuntimeError(f"streams of {burst.tokens} tokens have {sorted(set(tokens))}")
        return Sample.of(
            arrivals, seconds=seconds, cpu_seconds=used, client_cpu_seconds=own, tokens=sum(tokens), probes=probes
        )

    def _probe(self, ended: threading.Event, probes: list[float]) -> None:
        """Request one token repeatedly; append the seconds until the first byte of each to `probes`."""
        request = self._request(PROBE, 1)
        with socket.create_connection(("127.0.0.1", self._server.port)) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while not (ended.wait(PAUSE) and probes):
                start, data = time.perf_counter(), b""
                connection.sendall(request)
                while b'"text"' not in data:
                    data += connection.recv(65536)
                probes.append(time.perf_counter() - start)
                while not data.endswith(END):
                    data += connection.recv(65536)

    def _request(self, prompt: str, tokens: int) -> bytes:
        asked = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        body = json.dumps(asked | {"stream_options": {"include_usage": True}}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{self._server.port}\r\n"
        return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def _read(connections: Sequence[socket.socket], requests: Sequence[bytes]) -> list[list[Read]]:
    """Read each connection until its stream ends; the first entry is the time of the request."""
    reads: dict[int, list[Read]] = {}
    by_number = {connection.fileno(): connection for connection in connections}
    clock, missing = time.perf_counter, len(connections)
    with select.epoll() as poll:
        for number, request in zip(by_number, requests, strict=True):
            poll.register(number, select.EPOLLIN)
            reads[number] = [(clock(), b"")]
            by_number[number].sendall(request)
        while missing:
            for number, _ in poll.poll():
                data = by_number[number].recv(65536)
                reads[number].append((clock(), data))
                if data.endswith(END) or not data:
                    poll.unregister(number)
                    missing -= 1
    return list(reads.values())


def _parsed(reads: Sequence[Read]) -> tuple[list[float], int]:
    """Times of a stream's request and of its tokens, and the number of tokens that the server reports."""
    answer = b"".join(data for _, data in reads)
    head, _, body = answer.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200 ") or b"data: [DONE]" not in body or not body.endswith(END):
        raise RuntimeError(f"not a whole stream: {answer[:2000].decode('utf-8', 'replace')}")
    events = [line for line in dechunked(body).split(b"\n\n") if line.startswith(b"data: {")]
    usage = json.loads(events[-1][6:])["usage"]
    arrivals = [reads[0][0]] + [when for when, data in reads if b'"text"' in data]
    return arrivals, usage["completion_tokens"]
