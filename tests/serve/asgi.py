"""The application in the test's own loop, over the bundled model: a gate before its steps, and clients."""

from __future__ import annotations

import asyncio
import io
import json
import math
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from fastllama import LLM, AsyncEngine
from fastllama.serve.app import create_app
from fastllama.serve.keys import Keyring, new_key
from fastllama.serve.log import AccessLog
from fastllama.serve.options import ServerOptions
from fastllama.serve.server import served_model
from fastllama.serve.service import Service, ServiceLimits

JSON = {"content-type": "application/json"}
CHAT = {"messages": [{"role": "user", "content": "Once upon a time"}], "temperature": 0, "max_tokens": 8}
COMPLETION = {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 8}
STREAM = {"stream": True}
COMPLETIONS = "/v1/completions"
ENDLESS = COMPLETION | {"max_tokens": 900, "ignore_eos": True}


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 120))


async def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds; the test's own limit ends it."""
    while not condition():
        await asyncio.sleep(0.005)


class Gate:
    """Steps of an engine wait before it while it is closed; it counts those that came."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self.num_waiting = 0
        self.error: Exception | None = None  # what the next step raises
        self.open()

    def open(self, steps: float = math.inf) -> None:
        """Opens the gate for so many steps; the steps after them wait."""
        self._num_free = steps
        self._open.set()

    def close(self) -> None:
        self._open.clear()

    @contextmanager
    def before(self, llm: LLM) -> Iterator[Gate]:
        step = llm.engine.step

        def waiting() -> Any:
            self.num_waiting += 1
            assert self._open.wait(120)
            self._num_free -= 1
            if self._num_free <= 0:
                self.close()
            if self.error is not None:
                error, self.error = self.error, None
                raise error
            return step()

        llm.engine.step = waiting  # type: ignore[method-assign]
        try:
            yield self
        finally:
            self.open()
            del llm.engine.step


@dataclass
class Served:
    """A service that is up, and how to ask it."""

    service: Service
    engine: AsyncEngine
    llm: LLM
    app: Any
    client: httpx.AsyncClient
    gate: Gate
    log: io.StringIO

    async def post(self, path: str, body: Any, headers: Mapping[str, str] | None = None) -> httpx.Response:
        return await self.client.post(path, json=body, headers=headers)

    def idle(self) -> bool:
        """Whether nothing runs, waits or holds a page."""
        now = self.engine.statistics()
        free = now.num_available_pages == now.num_pages
        return free and not now.num_queued and not self.engine.worker.orders

    def logged(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.getvalue().splitlines()]


@asynccontextmanager
async def serving(
    llm: LLM,
    *,
    limits: ServiceLimits | None = None,
    keyring: Keyring | None = None,
    max_queue_size: int = 64,
    cors: tuple[str, ...] = (),
    **options: Any,
) -> AsyncIterator[Served]:
    """An open service, all of whose pages must be back at its end."""
    ring = keyring or Keyring.open(None, None)
    given = ServerOptions(ring, limits=limits or ServiceLimits(), cors_origins=cors, **options)
    log = io.StringIO()
    service = Service(ring, given.limits, log=AccessLog(log))
    app = create_app(service, hosts=given.hosts, cors_origins=cors)
    async with AsyncEngine(llm, max_queue_size=max_queue_size) as engine:
        service.open(engine, served_model(llm, "tiny", given))
        transport = httpx.ASGITransport(app=app)
        with Gate().before(llm) as gate:
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8229", timeout=None) as client:
                served = Served(service, engine, llm, app, client, gate, log)
                yield served
                gate.open()
                await until(served.idle)
                service.close()


def keyring_of(folder: Path, **limits: int) -> tuple[Keyring, dict[str, str]]:
    """A ring of one key, "alice", on a clock that does not advance, so nothing is refilled; and the key's header."""
    key, line = new_key("alice")
    path = folder / "keys.jsonl"
    path.write_text(json.dumps(json.loads(line) | limits) + "\n", encoding="utf-8")
    return Keyring.open(None, path, clock=lambda: 0.0), {"authorization": f"Bearer {key}"}


@dataclass
class Caller:
    """One ASGI request whose client sends, reads and leaves at the test's command."""

    app: Any
    path: str
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    method: str = "POST"

    def __post_init__(self) -> None:
        self.sent: list[Any] = []
        self.num_received = 0
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        if self.body is not None:
            self.upload(json.dumps(self.body).encode())

    def start(self) -> asyncio.Task[None]:
        names = JSON | {"host": "localhost:8229"} | dict(self.headers)
        scope = {
            "type": "http",
            "method": self.method,
            "path": self.path,
            "raw_path": self.path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in names.items()],
        }
        return asyncio.ensure_future(self.app(scope, self._receive, self._send))

    def upload(self, data: bytes, *, more: bool = False) -> None:
        self._events.put_nowait({"type": "http.request", "body": data, "more_body": more})

    def leave(self) -> None:
        self._events.put_nowait({"type": "http.disconnect"})

    @property
    def status(self) -> int | None:
        return self.sent[0]["status"] if self.sent else None

    @property
    def read(self) -> bytes:
        return b"".join(each.get("body", b"") for each in self.sent[1:])

    @property
    def answer(self) -> Any:
        return json.loads(self.read)

    @property
    def answer_headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.sent[0]["headers"]}

    async def _receive(self) -> Any:
        self.num_received += 1
        return await self._events.get()

    async def _send(self, message: Any) -> None:
        self.sent.append(message)
        await asyncio.sleep(0)


def events_of(caller: Caller) -> list[Any]:
    """The data of a stream's events; comments and [DONE] as text."""
    found: list[Any] = []
    for event in caller.read.decode().split("\n\n")[:-1]:
        data = event.removeprefix("data: ")
        found.append(json.loads(data) if data.startswith("{") else data)
    return found


def ended(caller: Caller) -> bool:
    last = caller.sent[-1] if caller.sent else {}
    return last.get("type") == "http.response.body" and not last.get("more_body", False)
