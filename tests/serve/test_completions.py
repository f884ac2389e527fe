"""Requests on their way through the engine: streams, refusals, failures, clients that leave, and the drain."""

from __future__ import annotations

import asyncio
import logging
import threading
from pathlib import Path
from typing import Any, cast

import pytest

from fastllama import LLM, AsyncEngine, SamplingParams
from fastllama.errors import QueueFullError, RequestError
from fastllama.serve import translate
from fastllama.serve.jobs import Job, PromptIds
from fastllama.serve.running import RunningJob
from fastllama.serve.service import ServiceLimits
from tests.serve.asgi import (
    CHAT,
    COMPLETION,
    COMPLETIONS,
    ENDLESS,
    STREAM,
    Caller,
    Served,
    ended,
    events_of,
    keyring_of,
    run,
    serving,
    until,
)


def text_of(events: list[Any]) -> str:
    return "".join(each["choices"][0]["text"] for each in events if isinstance(each, dict) and each.get("choices"))


def test_a_stream_has_the_text_of_the_whole_answer_and_no_proxy_keeps_it(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm) as served:
            whole = (await served.post(COMPLETIONS, COMPLETION)).json()["choices"][0]
            caller = Caller(served.app, COMPLETIONS, COMPLETION | STREAM)
            await caller.start()
            *events, done = events_of(caller)
            assert (text_of(events), done) == (whole["text"], "[DONE]")
            headers = caller.answer_headers
            assert headers["content-type"] == "text/event-stream; charset=utf-8"
            assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-store", "no")
            assert "content-length" not in headers

    run(test())


def test_the_role_of_an_answer_is_there_before_its_first_step_ends(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm) as served:
            served.gate.close()
            caller = Caller(served.app, "/v1/chat/completions", CHAT | STREAM)
            task = caller.start()
            await until(lambda: len(caller.sent) == 2)
            assert events_of(caller)[0]["choices"][0]["delta"]["role"] == "assistant"
            served.gate.open()
            await task
            assert events_of(caller)[-1] == "[DONE]"

    run(test())


def test_a_step_is_one_write_however_many_samples_it_has(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm) as served:
            body = COMPLETION | STREAM | {"n": 4, "temperature": 1, "seed": 1, "ignore_eos": True}
            caller = Caller(served.app, COMPLETIONS, body)
            await caller.start()
            writes = [each for each in caller.sent[1:-1] if each["body"]]
            assert len(writes) <= 8 + 1  # steps, and one for the end after them
            assert len(events_of(caller)) > 16

    run(test())


def test_a_stream_without_events_is_pinged_until_there_are_some(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm, limits=ServiceLimits(ping_seconds=0.02)) as served:
            served.gate.close()
            caller = Caller(served.app, COMPLETIONS, COMPLETION | STREAM)
            task = caller.start()
            await until(lambda: caller.read.count(b": ping\n\n") == 3)
            assert events_of(caller) == [": ping"] * 3
            served.gate.open()
            await task
            assert events_of(caller)[-1] == "[DONE]"
            sent = len(caller.sent)
            await asyncio.sleep(0.1)  # nothing follows the end
            assert len(caller.sent) == sent

    run(test())


def test_all_prompts_of_a_request_are_queued_or_none(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm, max_queue_size=4) as served:
            served.gate.close()
            first = Caller(served.app, COMPLETIONS, COMPLETION)
            task = first.start()
            await until(lambda: served.gate.num_waiting == 1)
            second = Caller(served.app, COMPLETIONS, COMPLETION | {"prompt": ["a", "b"]})
            both = asyncio.gather(task, second.start())
            await until(lambda: served.engine.statistics().num_queued >= 2)
            never = await served.post(COMPLETIONS, COMPLETION | {"prompt": ["a", "b", "c", "d", "e"]})
            assert (never.status_code, never.json()["error"]["param"]) == (400, "prompt")
            refused = await served.post(COMPLETIONS, COMPLETION | {"prompt": ["a", "b", "c", "d"]})
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
            assert refused.headers["retry-after"] == "1"
            served.gate.open()
            await both
            await until(served.idle)
            assert (first.status, second.status) == (200, 200)
            assert served.engine.statistics().num_generated_tokens <= 24 + 3  # the refused were ended by the next step

    run(test())


def test_where_the_queue_is_full_a_body_is_not_even_read(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm, max_queue_size=2) as served:
            served.gate.close()
            first, second = (Caller(served.app, COMPLETIONS, COMPLETION | {"prompt": ["a", "b"]}) for _ in range(2))
            tasks = [first.start()]
            await until(lambda: served.gate.num_waiting == 1)
            if served.engine.statistics().num_queued < 2:
                tasks.append(second.start())
                await until(lambda: served.engine.statistics().num_queued == 2)
            third = Caller(served.app, COMPLETIONS, COMPLETION)
            await third.start()
            assert (third.status, third.num_received) == (429, 0)
            assert third.answer["error"]["code"] == "queue_full"
            served.gate.open()
            await asyncio.gather(*tasks)

    run(test())


def test_prompts_that_were_queued_before_a_refusal_are_ended_at_once() -> None:
    """They do not wait for their streams to be collected: a traceback may hold them."""
    closed: list[int] = []

    class Stream:
        def close(self) -> None:
            closed.append(1)

    class Engine:
        num_added, max_queue_size = 0, 4

        def add_request(self, *given: Any, **options: Any) -> Stream:
            self.num_added += 1
            if self.num_added == 3:
                raise QueueFullError("planted")
            return Stream()

    job = Job("completion", "tiny", (PromptIds((1,)),) * 4, SamplingParams())
    with pytest.raises(QueueFullError) as raised:
        RunningJob.begin(cast("AsyncEngine", Engine()), job, 10)
    assert closed == [1, 1]
    assert raised.tb is not None


def test_a_deadline_that_passes_before_a_prompt_is_queued_is_one_too(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm) as served:
            assert served.service.api_error(RequestError("planted", reason="deadline")).status == 504

    run(test())


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_runs_too_long_gets_an_error(llm: LLM, stream: bool) -> None:
    async def test() -> None:
        async with serving(llm, limits=ServiceLimits(request_seconds=0.2)) as served:
            served.gate.close()
            caller = Caller(served.app, COMPLETIONS, ENDLESS | {"stream": stream})
            task = caller.start()
            await until(lambda: served.gate.num_waiting == 1)
            await asyncio.sleep(0.3)  # beyond its deadline
            served.gate.open()
            await task
            error = events_of(caller)[-1]["error"] if stream else caller.answer["error"]
            assert error["code"] == "deadline_exceeded"
            assert caller.status == (200 if stream else 504)
            assert stream or caller.answer_headers["x-should-retry"] == "false"
            assert b"[DONE]" not in caller.read
            assert ended(caller)

    run(test())


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_fails_gets_an_error_and_is_logged(
    llm: LLM, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with serving(llm) as served:
            served.gate.close()
            caller = Caller(served.app, COMPLETIONS, ENDLESS | {"stream": stream})
            task = caller.start()
            await until(lambda: served.gate.num_waiting == 1)
            served.gate.error = RuntimeError("planted")
            served.gate.open()
            await task
            error = events_of(caller)[-1]["error"] if stream else caller.answer["error"]
            assert (error["code"], caller.status) == ("engine_error", 200 if stream else 500)
            assert "planted" in error["message"]
            assert b"[DONE]" not in caller.read
            assert ended(caller)
            assert served.logged()[-1]["reason"] == "engine_error"
            assert (await served.post(COMPLETIONS, COMPLETION)).status_code == 200

    with caplog.at_level(logging.ERROR):
        run(test())
    assert "planted" in caplog.text


async def left(served: Served, caller: Caller, task: asyncio.Task[None]) -> None:
    """A client leaves, and all that its request held is freed."""
    caller.leave()
    await task
    served.gate.open()
    await until(served.idle)
    assert served.logged()[-1]["status"] == 499
    assert served.logged()[-1]["reason"] == "client_left"


@pytest.mark.parametrize("body", [ENDLESS, ENDLESS | STREAM, ENDLESS | {"prompt": ["a", "b", "c"]}, ENDLESS | {"n": 4}])
def test_a_client_that_leaves_ends_its_request_and_no_other(llm: LLM, body: dict[str, Any]) -> None:
    async def test() -> None:
        async with serving(llm) as served:
            expected = (await served.post(COMPLETIONS, COMPLETION | {"max_tokens": 200})).json()["choices"]
            gone = Caller(served.app, COMPLETIONS, body)
            served.gate.open(steps=5)  # so that it does not end before its client leaves
            task = gone.start()
            await until(lambda: served.engine.statistics().num_running > 0)
            stays = Caller(served.app, COMPLETIONS, COMPLETION | {"max_tokens": 200})
            other = stays.start()
            gone.leave()
            await task
            served.gate.open()
            await other
            assert stays.answer["choices"] == expected
            await until(served.idle)
            assert not ended(gone)

    run(test())


def test_a_client_that_leaves_while_it_is_queued_ends_its_request(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm) as served:
            served.gate.close()
            caller = Caller(served.app, COMPLETIONS, ENDLESS)
            task = caller.start()
            await until(lambda: bool(served.engine.worker.orders))
            caller.leave()
            await task
            served.gate.open()
            await until(served.idle)
            assert served.engine.statistics().num_generated_tokens <= 2

    run(test())


def test_a_client_that_leaves_while_its_prompt_is_translated_queues_nothing(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, began = translate.completion_job, threading.Event()
    may_end, has_ended = threading.Event(), threading.Event()

    def slow(*given: Any) -> Any:
        began.set()
        assert may_end.wait(60)
        try:
            return original(*given)
        finally:
            has_ended.set()

    monkeypatch.setattr(translate, "completion_job", slow)

    async def test() -> None:
        async with serving(llm) as served:
            caller = Caller(served.app, COMPLETIONS, ENDLESS)
            task = caller.start()
            await until(began.is_set)
            caller.leave()
            await task
            assert served.logged()[-1]["status"] == 499
            may_end.set()
            await until(has_ended.is_set)
            assert (await served.post("/tokenize", {"prompt": "a"})).status_code == 200
            assert served.engine.statistics().num_accepted == 0

    run(test())


def test_a_client_that_leaves_while_it_uploads_is_no_error(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with serving(llm) as served:
            for path in (COMPLETIONS, "/tokenize"):
                caller = Caller(served.app, path)
                caller.upload(b'{"prompt": "', more=True)
                task = caller.start()
                await until(lambda caller=caller: caller.num_received == 2)  # type: ignore[misc]
                await left(served, caller, task)
                assert caller.sent == []

    with caplog.at_level(logging.INFO):
        run(test())
    assert caplog.records == []


def test_a_keys_samples_are_counted_before_anything_is_queued(llm: LLM, tmp_path: Path) -> None:
    ring, header = keyring_of(tmp_path, max_concurrent=3)
    key = ring.find(header["authorization"])

    async def test() -> None:
        async with serving(llm, keyring=ring) as served:
            for more in ({"prompt": ["a"] * 4}, {"prompt": ["a", "b"], "n": 2, "stream": True}):
                never = await served.post(COMPLETIONS, COMPLETION | more, header)
                assert (never.status_code, "max_concurrent" in never.json()["error"]["message"]) == (400, True)
            running = Caller(served.app, COMPLETIONS, ENDLESS | {"prompt": ["a", "b"]}, header)
            task = running.start()
            await until(lambda: served.engine.statistics().num_running == 2)
            assert key.num_running == 2
            later = await served.post(COMPLETIONS, COMPLETION | {"prompt": ["a", "b"]}, header)
            assert (later.status_code, later.json()["error"]["code"]) == (429, "rate_limit_exceeded")
            assert (await served.post(COMPLETIONS, COMPLETION, header)).status_code == 200
            assert served.engine.statistics().num_accepted == 3
            await left(served, running, task)
            assert key.num_running == 0

    run(test())


def test_the_tokens_of_a_client_that_left_are_charged(llm: LLM, tmp_path: Path) -> None:
    ring, header = keyring_of(tmp_path, tokens_per_minute=10_000, max_concurrent=1)
    key = ring.find(header["authorization"])

    async def test() -> None:
        async with serving(llm, keyring=ring) as served:
            caller = Caller(served.app, COMPLETIONS, ENDLESS, header)
            served.gate.open(steps=60)
            task = caller.start()
            await until(lambda: served.engine.statistics().num_generated_tokens >= 50)
            second = await served.post(COMPLETIONS, COMPLETION, header)
            assert second.status_code == 429
            await left(served, caller, task)
            assert key.num_running == 0
            left_over = int(key.headers()["x-ratelimit-remaining-tokens"])
            assert left_over <= 10_000 - 50
            assert served.logged()[-1]["completion_tokens"] >= 50

    run(test())
