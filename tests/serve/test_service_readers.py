"""Readers that stall until their connection is dropped: no answer that nobody took is logged as one."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fastllama import LLM
from fastllama.serve.service import ServiceLimits
from tests.serve.asgi import COMPLETION, COMPLETIONS, ENDLESS, STREAM, Caller, run, serving, until


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


def test_a_ping_to_a_reader_that_was_dropped_is_no_error(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with serving(llm, limits=ServiceLimits(ping_seconds=0.01)) as served:
            served.gate.close()
            caller = StalledCaller(served.app, COMPLETIONS, ENDLESS | STREAM).takes(2)
            task = caller.start()
            await until(lambda: caller.is_stalled)
            caller.drop()
            await task
            assert served.logged()[-1]["status"] == 499

    run(test())
    assert not [each for each in caplog.records if each.name == "asyncio"]
