"""The end of a service: a drain, an engine beyond repair, and the canary that runs until then."""

from __future__ import annotations

import asyncio
import json

import pytest

from fastllama import LLM
from fastllama.serve.service import Service
from tests.serve.asgi import (
    COMPLETION,
    COMPLETIONS,
    ENDLESS,
    STREAM,
    Caller,
    Served,
    ended,
    events_of,
    run,
    serving,
    until,
)


async def in_a_drain(served: Served, caller: Caller, seconds: float) -> tuple[asyncio.Task[None], asyncio.Task[None]]:
    """One request that runs, and a drain that has begun."""
    task = caller.start()
    await until(lambda: served.engine.statistics().num_running == 1)
    drain = asyncio.ensure_future(served.service.drain(seconds))
    await until(lambda: served.service.phase == "draining")
    return task, drain


def test_a_drain_refuses_what_is_new_and_waits_for_what_runs(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm) as served:
            upload = Caller(served.app, COMPLETIONS)
            upload.upload(b'{"prompt"', more=True)
            uploading = upload.start()
            caller = Caller(served.app, COMPLETIONS, ENDLESS | {"max_tokens": 300} | STREAM)
            task, drain = await in_a_drain(served, caller, 100)
            for path in ("/ready", "/health"):
                answer = await served.client.get(path)
                assert answer.status_code == (503 if path == "/ready" else 200)
            refused = await served.post(COMPLETIONS, COMPLETION)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            assert refused.headers["retry-after"] == "1"
            await uploading
            assert upload.answer["error"]["code"] == "shutting_down"
            await task
            await drain
            assert events_of(caller)[-1] == "[DONE]"
            assert len(events_of(caller)) > 100

    run(test())


@pytest.mark.parametrize("stream", [False, True])
def test_what_a_drain_cuts_gets_an_error(llm: LLM, stream: bool) -> None:
    async def test() -> None:
        async with serving(llm) as served:
            caller = Caller(served.app, COMPLETIONS, ENDLESS | {"stream": stream})
            task, drain = await in_a_drain(served, caller, 0.01)
            await drain
            await task
            error = events_of(caller)[-1]["error"] if stream else caller.answer["error"]
            assert (error["code"], caller.status) == ("shutting_down", 200 if stream else 503)
            assert b"[DONE]" not in caller.read
            assert ended(caller)

    run(test())


def test_a_drain_that_has_nothing_to_wait_for_ends(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm) as served:
            await served.service.drain(100)

    run(test())


def test_an_engine_beyond_repair_ends_everything_with_its_cause(llm: LLM) -> None:
    with LLM("tiny", kv_cache_tokens=4096, max_num_seqs=4) as own:

        async def test() -> None:
            async with serving(own) as served:
                stream = Caller(served.app, COMPLETIONS, ENDLESS | STREAM)
                whole = Caller(served.app, COMPLETIONS, ENDLESS)
                tasks = [stream.start(), whole.start()]
                await until(lambda: served.engine.statistics().num_running == 2)
                own.engine.device_error = RuntimeError("planted in the device")
                await asyncio.gather(*tasks)
                for error in (events_of(stream)[-1]["error"], whole.answer["error"]):
                    assert error["code"] == "engine_error"
                    assert "planted in the device" in error["message"]
                health = await served.client.get("/health")
                assert health.status_code == 503
                assert "planted in the device" in health.json()["reason"]
                refused = await served.post(COMPLETIONS, COMPLETION)
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_down")
                await served.service.go_down()
                assert (await served.client.get("/ready")).json()["error"]["code"] == "engine_down"

        run(test())


def test_a_canary_is_asked_for_as_long_as_the_service_is_open(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm) as served:
            service = Service(served.service.keyring, canary_seconds=3600)
            service.open(served.engine, served.service.model)
            await until(lambda: json.loads(service.verdict()[1])["canary"] == "agreed")
            assert b'canary_requests_total{result="agreed"} 1.0' in service.metrics.render()
            service.close()

    run(test())
