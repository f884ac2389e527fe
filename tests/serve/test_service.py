"""A service beyond single requests: a hanging step ends its requests, and a served model is kept from the collector."""

from __future__ import annotations

import asyncio
import gc
import signal
import weakref
from functools import partial
from typing import Any

import pytest

from fastllama import LLM
from fastllama.serve import service as service_module
from fastllama.serve.errors import ApiError
from fastllama.serve.keys import Keyring
from fastllama.serve.options import ServerOptions
from fastllama.serve.running import RunningJob
from fastllama.serve.server import serve
from fastllama.serve.service import ServiceLimits
from tests.serve.asgi import COMPLETION, COMPLETIONS, ENDLESS, STREAM, Caller, ended, events_of, run, serving, until

BODIES = [ENDLESS, ENDLESS | STREAM, ENDLESS | {"prompt": ["a", "b", "c"]} | STREAM]


def error_of(caller: Caller) -> tuple[int | None, str]:
    """The status, and the code of the error that a response is or ends with."""
    is_stream = caller.answer_headers["content-type"].startswith("text/event-stream")
    return caller.status, (events_of(caller)[-1] if is_stream else caller.answer)["error"]["code"]


@pytest.mark.parametrize("body", BODIES, ids=["whole", "stream", "prompts"])
def test_a_deadline_ends_a_request_even_while_a_step_hangs(
    llm: LLM, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "GRACE_SECONDS", 0.1)

    async def test() -> None:
        async with serving(llm, limits=ServiceLimits(request_seconds=0.1)) as served:
            served.gate.close()
            caller = Caller(served.app, COMPLETIONS, body)
            await caller.start()
            assert error_of(caller) == (200 if "stream" in body else 504, "deadline_exceeded")
            assert ended(caller)
            assert b"[DONE]" not in caller.read
            assert served.logged()[-1]["reason"] == "deadline_exceeded"

    run(test())


@pytest.mark.parametrize("body", BODIES, ids=["whole", "stream", "prompts"])
def test_a_drain_ends_a_request_even_while_a_step_hangs(
    llm: LLM, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "CUT_SECONDS", 0.1)

    async def test() -> None:
        async with serving(llm) as served:
            served.gate.close()
            caller = Caller(served.app, COMPLETIONS, body)
            task = caller.start()
            await until(lambda: served.gate.num_waiting == 1)
            await served.service.drain(0)
            await task
            status = 200 if "stream" in body else 503
            assert error_of(caller) == (status, "shutting_down")
            assert ended(caller)
            assert (served.logged()[-1]["status"], served.logged()[-1]["reason"]) == (status, "shutting_down")

    run(test())


def test_an_answer_that_was_made_in_time_is_read_at_its_readers_pace(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    cuts: list[ApiError] = []
    cut = RunningJob.cut

    def noted(running: RunningJob, failure: ApiError) -> None:
        cuts.append(failure)
        cut(running, failure)

    monkeypatch.setattr(RunningJob, "cut", noted)
    monkeypatch.setattr(service_module, "GRACE_SECONDS", -59.8)

    async def test() -> None:
        async with serving(llm, limits=ServiceLimits(request_seconds=60)) as served:
            may_read = asyncio.Event()
            caller = Caller(served.app, COMPLETIONS, COMPLETION | STREAM)
            send = caller._send

            async def slow(message: Any) -> None:
                await may_read.wait()
                await send(message)

            monkeypatch.setattr(caller, "_send", slow)
            task = caller.start()
            await until(lambda: served.engine.statistics().num_accepted == 1 and served.idle() and bool(cuts))
            may_read.set()
            await task
            assert events_of(caller)[-1] == "[DONE]"

    run(test())


def test_a_request_that_has_ended_is_kept_by_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[weakref.ref[RunningJob]] = []
    begin = RunningJob.begin

    def noted(*given: Any) -> RunningJob:
        running = begin(*given)
        kept.append(weakref.ref(running))
        return running

    monkeypatch.setattr(RunningJob, "begin", noted)

    async def test() -> None:
        async with serving(llm) as served:
            for more in ({}, STREAM):
                await served.post(COMPLETIONS, COMPLETION | more)
            assert len(kept) == 2
            await until(lambda: gc.collect() >= 0 and not any(each() for each in kept))

    run(test())


def test_a_model_that_is_served_is_nothing_that_the_collector_looks_at() -> None:
    frozen: list[int] = []

    def noting(line: str) -> None:
        if line.startswith("ready on"):
            frozen.append(gc.get_freeze_count())
            signal.raise_signal(signal.SIGTERM)

    load = partial(LLM, "tiny", kv_cache_tokens=1024)
    assert serve(ServerOptions(Keyring.open(None, None), port=0), load, model="tiny", say=noting) == 0
    assert frozen[0] > 10_000
    assert gc.get_freeze_count() == 0
