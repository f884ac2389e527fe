"""A server in a process of its own, as a shell starts it, and clients on raw sockets."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]
LIMIT = 120  # seconds: a busy machine is slow, not wrong


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


class LiveServer:
    """`fastllama serve` on a free port; with faults, tests.serve.hurt."""

    def __init__(self, *options: str, faults: str = "", env: Mapping[str, str] | None = None) -> None:
        module = ["tests.serve.hurt", *faults.split()] if faults else ["fastllama"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", *module, "serve", "--port", "0", "--kv-cache-tokens", "8192", *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | dict(env or {}),
            # A background job's child would ignore it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        self.printed, self.logged = "", ""
        self._readers = [threading.Thread(target=self._read, args=(name,)) for name in ("printed", "logged")]
        for reader in self._readers:
            reader.start()

    def _read(self, name: str) -> None:
        stream = self.process.stderr if name == "printed" else self.process.stdout
        assert stream is not None
        for line in stream:
            setattr(self, name, getattr(self, name) + line)

    def until_bound(self) -> None:
        wait_for(lambda: "is bound" in self.printed or self.process.poll() is not None)
        assert self.process.poll() is None, self.printed

    def until_ready(self) -> None:
        wait_for(lambda: "ready on" in self.printed or self.process.poll() is not None)
        assert self.process.poll() is None, self.printed

    @property
    def url(self) -> str:
        found = re.search(r"https?://\S+:\d+", self.printed)
        assert found is not None, self.printed
        return found[0]

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=LIMIT, trust_env=False)

    def get(self, path: str) -> httpx.Response:
        with self.client() as client:
            return client.get(path)

    def post(self, path: str, body: Any) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=body)

    def connect(self, path: str, body: Any, *, missing: int = 0) -> socket.socket:
        """A connection that has sent a request, less so many bytes of its body."""
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client = socket.create_connection(("127.0.0.1", int(self.url.rpartition(":")[2])), timeout=LIMIT)
        client.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data[: len(data) - missing])
        return client

    def metric(self, name: str) -> float:
        found = re.search(rf"^fastllama:{re.escape(name)} (\S+)$", self.get("/metrics").text, re.MULTILINE)
        assert found is not None, name
        return float(found[1])

    def is_idle(self) -> bool:
        """Whether nothing runs, waits or holds a page."""
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        return not any(self.metric(name) for name in names)

    def num_descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """The exit status, once the process has ended and all its output was read."""
        status = self.process.wait(LIMIT)
        for reader in self._readers:
            reader.join(LIMIT)
        return status

    def kill(self) -> None:
        self.process.kill()
        self.wait()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate of this machine's names, signed by itself, and its key."""
    chain, key = folder / "cert.pem", folder / "key.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2"]
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*make, *names, "-keyout", key, "-out", chain], check=True, capture_output=True)
    return chain, key


@contextmanager
def live(*options: str, ready: bool = True, **more: Any) -> Iterator[LiveServer]:
    """A server that is ready, or at least bound, and killed at the end."""
    server = LiveServer(*options, **more)
    try:
        server.until_bound()
        if ready:
            server.until_ready()
        yield server
    finally:
        server.kill()


def leave(client: socket.socket, *, reset: bool) -> None:
    """Close a connection: with what the kernel sends for a program that ends, or for one that is killed with data."""
    if reset:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    client.close()


def read_until(client: socket.socket, text: bytes) -> bytes:
    found = b""
    while text not in found:
        data = client.recv(65536)
        assert data, found
        found += data
    return found
