"""One AsyncEngine at a time owns an LLM, until its shutdown, its LLM's end, or its garbage collection."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from fastllama import LLM, AsyncEngine
from fastllama.errors import RequestError
from fastllama.runtime.serving.async_engine import RequestStream
from tests.io import tokenizer_samples as samples
from tests.runtime.models import ours, running
from tests.runtime.serving.test_async_engine import (
    HOT,
    LONG,
    all_of,
    alone,
    gated,
    ids_of,
    run,
    until,
    until_it_fails,
)
from tests.runtime.test_engine import PROMPTS, tokens_of

SERVES = r"^this LLM serves an AsyncEngine; legal: that engine's methods, or this LLM's after its shutdown\(\)$"
CLOSED = r"^this LLM is closed; make a new one$"
SIZES: dict[str, Any] = {"kv_cache_tokens": 1024, "max_model_len": 256, "page_size": 16, "progress": False}


def test_a_second_engine_is_refused_until_the_first_is_shut_down() -> None:
    async def test() -> None:
        with running(ours()) as llm:
            async with AsyncEngine(llm) as first:
                stream = first.add_request(PROMPTS[0], HOT)
                before = threading.active_count()
                for _ in range(2):
                    with pytest.raises(RuntimeError, match=SERVES):
                        AsyncEngine(llm)
                assert threading.active_count() <= before
                assert ids_of(await all_of(stream)) == alone(PROMPTS[0])
            async with AsyncEngine(llm) as second:
                assert ids_of(await all_of(second.add_request(PROMPTS[1], HOT))) == alone(PROMPTS[1])
            assert tokens_of(llm.generate(PROMPTS[2], HOT)[0]) == alone(PROMPTS[2])

    run(test())


def test_the_llm_is_refused_beside_its_engine_and_its_readers_do_not_notice() -> None:
    async def test() -> None:
        tokenizer = samples.tokenizer("tiny")
        with running(ours(vocab_size=2048), tokenizer=tokenizer, chat_format="llama2") as llm:
            (right,) = llm.generate(PROMPTS[1], replace(HOT, max_tokens=40))
            started = llm.start(PROMPTS[0], HOT)
            pieces = llm.follow(started)
            llm.engine.step()
            async with AsyncEngine(llm) as engine:
                stream = engine.add_request(PROMPTS[1], replace(HOT, max_tokens=40))
                uses: list[Callable[[], Any]] = [
                    lambda: llm.generate("a", HOT),
                    lambda: llm.chat([{"role": "user", "content": "a"}], HOT),
                    lambda: llm.stream("a", HOT),
                    lambda: llm.start("a", HOT),
                    lambda: llm.fork(started),
                    lambda: llm.reset_prefix_cache(),
                    lambda: llm.update_weights({}),
                ]
                for use in uses:
                    with pytest.raises(RuntimeError, match=SERVES):
                        use()
                assert llm.encode("a") == tokenizer.encode("a"), "which needs no owner"
                assert ids_of(await all_of(stream)) == tokens_of(right)
            "".join(pieces)
            assert started.finished

    run(test())


def test_an_engine_that_cannot_start_its_thread_leaves_the_llm_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with running(ours()) as llm:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            with pytest.raises(RuntimeError, match="can't start new thread"):
                AsyncEngine(llm)
        assert tokens_of(llm.generate(PROMPTS[0], HOT)[0]) == alone(PROMPTS[0])


@pytest.mark.parametrize("busy", [True, False])
def test_closing_the_llm_ends_its_engine_and_frees_all(busy: bool) -> None:
    async def test() -> None:
        model = gated()
        llm = LLM(model, **SIZES)
        engine = AsyncEngine(llm)
        held = [weakref.ref(each) for each in (llm.engine, llm.engine.model, llm.engine.pool, llm.engine._runner)]
        model.steps = 3
        streams = [engine.add_request(prompt, LONG) for prompt in PROMPTS] if busy else []
        for stream in streams:
            await stream.__anext__()
        gate = model.gate
        del model
        await until(lambda: not busy or not gate.is_set())
        threading.Timer(0.05, gate.set).start()
        llm.close()
        llm.close()
        assert not engine.worker.thread.is_alive()
        for number, stream in enumerate(streams):
            await until_it_fails(stream, f"^request '{number}' was aborted: the LLM was closed$")
        with pytest.raises(RuntimeError, match=CLOSED):
            engine.add_request(PROMPTS[0], HOT)
        with pytest.raises(RuntimeError, match=CLOSED):
            AsyncEngine(llm)
        gc.collect()
        assert [each() for each in held] == [None] * 4
        assert not engine.health().alive
        await engine.drain()
        await engine.shutdown()
        for late in (engine.reset_prefix_cache(), engine.update_weights({})):
            with pytest.raises(RuntimeError, match=r"^this AsyncEngine was shut down; make a new one$"):
                await late

    run(test())


def test_closing_from_another_thread_waits_for_the_step_that_runs() -> None:
    async def test() -> None:
        model = gated()
        llm = LLM(model, **SIZES)
        engine = AsyncEngine(llm)
        model.steps = 3
        stream = engine.add_request(PROMPTS[1], LONG)
        await stream.__anext__()
        await until(lambda: not model.gate.is_set())
        await until(lambda: (engine.health().step_seconds or 0) > 0.02)
        with ThreadPoolExecutor(2) as pool:
            closes = [pool.submit(llm.close) for _ in range(2)]
            await asyncio.sleep(0.05)
            assert not any(close.done() for close in closes)
            model.gate.set()
            await asyncio.gather(*map(asyncio.wrap_future, closes))
        await until_it_fails(stream, "^request '0' was aborted: the LLM was closed$")

    run(test())


def test_closing_while_another_thread_generates_ends_that_in_a_sentence() -> None:
    model = gated()
    llm = LLM(model, **SIZES)
    freed = weakref.ref(llm.engine.pool)
    model.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(llm.generate, PROMPTS, LONG)
        while not llm.engine.has_work:
            threading.Event().wait(0.001)
        llm.close()
        model.gate.set()
        with pytest.raises(RuntimeError, match=CLOSED):
            busy.result()
    del busy
    gc.collect()
    assert freed() is None


@pytest.mark.parametrize("num_running", [0, 2])
def test_an_engine_without_references_ends_and_frees_all(num_running: int) -> None:
    async def test() -> None:
        llm = LLM(ours(), **SIZES)
        engine = AsyncEngine(llm)
        streams = [engine.add_request(prompt, LONG) for prompt in PROMPTS[:num_running]]
        for stream in streams:
            await stream.__anext__()
        thread = engine.worker.thread
        held = [weakref.ref(each) for each in (engine, llm.engine, llm.engine.model, llm.engine.pool)]
        del llm, engine, streams
        if num_running:
            del stream
        gc.collect()
        thread.join(30)
        assert not thread.is_alive()
        gc.collect()
        assert [each() for each in held] == [None] * 4

    run(test())


def test_the_llm_can_be_used_again_when_its_engine_has_no_references() -> None:
    with running(ours()) as llm:
        engine = AsyncEngine(llm)
        thread = engine.worker.thread
        del engine
        gc.collect()
        thread.join(30)
        assert tokens_of(llm.generate(PROMPTS[0], HOT)[0]) == alone(PROMPTS[0])


def test_a_stream_that_is_held_keeps_its_engine() -> None:
    async def test() -> None:
        def ask() -> tuple[RequestStream, threading.Thread]:
            engine = AsyncEngine(LLM(ours(), **SIZES))
            engine.add_request(PROMPTS[2], LONG)  # a stream without a reference
            return engine.add_request(PROMPTS[1], HOT), engine.worker.thread

        stream, thread = ask()
        gc.collect()
        assert ids_of(await all_of(stream)) == alone(PROMPTS[1])
        assert stream.output().outputs[0].token_ids == alone(PROMPTS[1])[0]
        del stream
        gc.collect()
        thread.join(30)
        assert not thread.is_alive()

    run(test())


def test_garbage_collection_may_end_an_engine_while_it_is_ended() -> None:
    """`LLM.close` allocates, which may collect the very AsyncEngine that it ends."""
    with running(ours()) as llm:
        engine = AsyncEngine(llm)
        worker = engine.worker

        def end_within_an_end() -> None:
            with worker._lock:
                worker.end("within")

        threading.Thread(target=end_within_an_end, daemon=True).start()
        worker.thread.join(30)
        assert not worker.thread.is_alive()
        with pytest.raises(RuntimeError, match="was shut down"):
            engine.add_request(PROMPTS[0])


def test_an_engine_ends_from_within_its_step_only_in_a_sentence() -> None:
    async def test() -> None:
        with running(ours()) as llm:
            async with AsyncEngine(llm) as engine:

                def closing(token_ids: list[int], logits: Any) -> Any:
                    llm.close()

                stream = engine.add_request(PROMPTS[0], replace(HOT, logits_processors=[closing]))
                with pytest.raises(RequestError, match="this LLM was called from within one of its steps"):
                    await all_of(stream)
                assert ids_of(await all_of(engine.add_request(PROMPTS[1], HOT))) == alone(PROMPTS[1])

    run(test())
