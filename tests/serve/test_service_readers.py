"""Readers that stall until their connection is dropped: an answer that was never read is not logged as one."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import pytest

from fastllama import LLM
from fastllama.serve.responses import JSON
from tests.serve.asgi import COMPLETION, COMPLETIONS, ENDLESS, STREAM, Caller, run, serving, until
from tests.serve.live import LIMIT, leave, live, read_until, wait_for


class StalledCaller(Caller):
    """Takes so many messages; the next waits until its connection is dropped, as uvicorn lets it."""

    def takes(self, number: int) -> StalledCaller:
        self._left, self._dropped, self.is_stalled = number, asyncio.Event(), False
        return self

    def drop(self) -> None:
        self.leave()
        self._dropped.set()

    async def _send(self, message: Any) -> None:
        if self._dropped.is_set():
            return
        if not self._left:
            self.is_stalled = True
            await self._dropped.wait()
            return
        self._left -= 1
        self.sent.append(message)


@pytest.mark.parametrize(
    ("path", "body", "number"),
    [
        ("/v1/models", None, 1),
        ("/v1/models/tiny", None, 1),
        ("/", None, 0),
        ("/detokenize", {"tokens": [5] * 10}, 1),
        ("/detokenize", {"tokens": [5] * 200_000}, 2),
        (COMPLETIONS, COMPLETION, 1),
        (COMPLETIONS, ENDLESS | STREAM, 3),
    ],
)
def test_a_reader_that_stalls_until_it_is_dropped_has_left(llm: LLM, path: str, body: Any, number: int) -> None:
    async def test() -> None:
        async with serving(llm) as served:
            caller = StalledCaller(served.app, path, body, method="GET" if body is None else "POST").takes(number)
            task = caller.start()
            await until(lambda: caller.is_stalled)
            caller.drop()
            await task
            assert (served.logged()[-1]["status"], served.logged()[-1]["reason"]) == (499, "client_left")

    run(test())


def test_what_a_real_server_could_not_send_is_logged_so() -> None:
    body = json.dumps({"tokens": [866] * 800_000}).encode()  # an answer that no kernel takes
    head = (
        f"POST /detokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: {JSON}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with live() as server, socket.socket() as stalled:
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.settimeout(LIMIT)
        stalled.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        stalled.sendall(head.encode() + body)
        read_until(stalled, b"HTTP/1.1 200 OK")
        leave(stalled, reset=True)
        wait_for(lambda: "/detokenize" in server.logged)
        (line,) = [json.loads(each) for each in server.logged.splitlines() if "/detokenize" in each]
        assert (line["status"], line["reason"]) == (499, "client_left")
