"""The asynchronous engine: deltas, ends of every kind, full queues, slow readers, and other requests undisturbed."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from fastllama import LLM, AsyncEngine, LlamaForCausalLM, RequestDelta, SamplingParams
from fastllama.errors import QueueFullError, RequestError
from fastllama.layers.batch import BatchMeta, KVCache
from fastllama.runtime.engine import Engine
from fastllama.runtime.outputs import CompletionOutput
from fastllama.runtime.serving.async_engine import RequestStream
from tests.runtime.models import ours, prompt_of, running
from tests.runtime.planning.test_isolation import CURSED
from tests.runtime.test_engine import PROMPTS, tokens_of

HOT = SamplingParams(temperature=3.0, seed=3, max_tokens=10, logit_bias={CURSED: -1000})
LONG = replace(HOT, max_tokens=200)


def alone(prompt: list[int], params: SamplingParams = HOT) -> list[tuple[int, ...]]:
    with running(ours()) as llm:
        return tokens_of(llm.generate(prompt, params)[0])


class Gated(LlamaForCausalLM):
    """A model whose steps wait while the gate is closed, which closes by itself before the step after `steps` more."""

    steps = -1

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.gate = threading.Event()
        self.gate.set()

    def forward(self, ids: Tensor, batch: BatchMeta, kv: KVCache) -> Tensor:
        if self.steps == 0:
            self.gate.clear()
        self.steps -= 1
        assert self.gate.wait(15)
        return super().forward(ids, batch, kv)


def gated() -> Gated:
    model = ours(kind=Gated)
    assert isinstance(model, Gated)
    return model


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


@asynccontextmanager
async def serving(model: LlamaForCausalLM, *, max_queue_size: int = 1024, **options: Any) -> AsyncIterator[AsyncEngine]:
    """An engine over a small cache, all of whose pages must be back when it is shut down."""
    with running(model, **options) as llm:
        async with AsyncEngine(llm, max_queue_size=max_queue_size) as engine:
            yield engine
        assert engine.worker.orders == {}
        assert engine.statistics().num_queued == 0
        assert not engine.worker.thread.is_alive()


async def all_of(stream: RequestStream) -> list[RequestDelta]:
    return [delta async for delta in stream]


async def until_it_fails(stream: RequestStream, message: str) -> list[RequestDelta]:
    """The deltas that come before a stream raises."""
    deltas: list[RequestDelta] = []

    async def read() -> None:
        async for delta in stream:
            deltas.append(delta)

    with pytest.raises(RequestError, match=message):
        await read()
    assert await all_of(stream) == [], "once is enough"
    return deltas


def joined(deltas: list[RequestDelta]) -> dict[int, CompletionOutput]:
    """The samples that deltas add up to, each with one end, in its last piece."""
    whole: dict[int, CompletionOutput] = {}
    for piece in (piece for delta in deltas for piece in delta.outputs):
        before = whole.get(piece.index)
        if before is not None:
            assert before.finish_reason is None, "a sample goes on after its end"
            logprobs = None if piece.logprobs is None else (*(before.logprobs or ()), *piece.logprobs)
            token_ids = (*before.token_ids, *piece.token_ids)
            piece = replace(piece, text=before.text + piece.text, token_ids=token_ids, logprobs=logprobs)
        whole[piece.index] = piece
    return whole


def ids_of(deltas: list[RequestDelta]) -> list[tuple[int, ...]]:
    return [sample.token_ids for _, sample in sorted(joined(deltas).items())]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def test_deltas_add_up_to_what_generate_gives() -> None:
    params = [
        SamplingParams(temperature=0.9, seed=7, n=2, max_tokens=30, logprobs=2, prompt_logprobs=1, stop="the"),
        SamplingParams(temperature=0, max_tokens=40),
    ]
    prompt = "Once upon a time, there was"

    async def deltas(llm: LLM) -> list[list[RequestDelta]]:
        async with AsyncEngine(llm) as engine:
            return await asyncio.gather(*(all_of(engine.add_request(prompt, own)) for own in params))

    with LLM("tiny", kv_cache_tokens=1024, progress=False) as llm:
        expected = llm.generate([prompt] * 2, params)
        found = asyncio.run(deltas(llm))
    for mine, whole in zip(found, expected, strict=True):
        for index, sample in joined(mine).items():
            assert replace(sample, logprobs=None) == replace(whole.outputs[index], logprobs=None)
            assert (sample.logprobs is None) == (whole.outputs[index].logprobs is None)
        assert len(joined(mine)) == len(whole.outputs)
        assert [delta.finished for delta in mine] == [False] * (len(mine) - 1) + [True]
        metrics = mine[-1].metrics
        assert metrics is not None
        assert metrics.num_generated_tokens == whole.metrics.num_generated_tokens
        assert metrics.num_prompt_tokens == whole.metrics.num_prompt_tokens
    reports = [delta.prompt_logprobs for delta in found[0]]
    assert reports[1:] == [None] * (len(reports) - 1)
    assert reports[0] is not None
    assert [r and r.token_id for r in reports[0]] == [r and r.token_id for r in expected[0].prompt_logprobs or ()]


def test_requests_of_many_tasks_run_together_and_come_in_pieces() -> None:
    async def test() -> None:
        async with serving(ours()) as engine:
            found = await asyncio.gather(*(all_of(engine.add_request(prompt, HOT)) for prompt in PROMPTS))
        assert [ids_of(deltas) for deltas in found] == [alone(prompt) for prompt in PROMPTS]

    run(test())


def test_messages_and_refusals_are_those_of_llm() -> None:
    async def test() -> None:
        with LLM("tiny", kv_cache_tokens=1024, progress=False) as llm:
            messages = [{"role": "user", "content": "Hi"}]
            params = SamplingParams(temperature=0, max_tokens=5)
            expected = llm.chat(messages, params)  # type: ignore[arg-type]
            async with AsyncEngine(llm) as engine:
                deltas = await all_of(engine.add_request(messages, params))  # type: ignore[arg-type]
                with pytest.raises(ValueError, match="prompt token 0 is -1"):
                    engine.add_request([-1])
                with pytest.raises(ValueError, match="the prompt has 0 tokens"):
                    engine.add_request([])
                with pytest.raises(ValueError, match="deadline is -1"):
                    engine.add_request("a", deadline=-1)
                with pytest.raises(TypeError, match="prompt is 5"):
                    engine.add_request(5)  # type: ignore[arg-type]
                with pytest.raises(TypeError, match="params is 5"):
                    engine.add_request("a", 5)  # type: ignore[arg-type]
                assert engine.statistics().num_accepted == 1
        assert ids_of(deltas) == tokens_of(expected)
        with pytest.raises(ValueError, match="max_queue_size is 0; legal: at least 1"):
            AsyncEngine(llm, max_queue_size=0)

    run(test())


@pytest.mark.parametrize("how", ["close", "cancel", "let go"])
def test_who_leaves_takes_nothing_along(how: str) -> None:
    async def test() -> None:
        async with serving(ours()) as engine:
            stays = asyncio.ensure_future(all_of(engine.add_request(PROMPTS[2], replace(HOT, max_tokens=60))))
            stream = engine.add_request(PROMPTS[1], LONG)
            await stream.__anext__()
            if how == "close":
                await stream.aclose()
                assert await all_of(stream) == []
            elif how == "cancel":
                reader = asyncio.ensure_future(all_of(stream))
                await asyncio.sleep(0)
                reader.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reader
            else:
                del stream
            await until(lambda: engine.statistics().num_finished.get("abort") == 1)
            assert ids_of(await stays) == alone(PROMPTS[2], replace(HOT, max_tokens=60))
            assert engine.statistics().num_generated_tokens < 60 + 200

    run(test())


def test_closing_ends_the_wait_of_another_task() -> None:
    async def test() -> None:
        model = gated()
        async with serving(model) as engine:
            model.gate.clear()
            stream = engine.add_request(PROMPTS[1], LONG)
            reader = asyncio.ensure_future(all_of(stream))
            await asyncio.sleep(0.01)
            stream.close()
            assert await reader == []
            model.gate.set()

    run(test())


def test_a_full_queue_rejects_and_queues_nothing() -> None:
    async def test() -> None:
        model = gated()
        async with serving(model, max_queue_size=3, max_num_seqs=2) as engine:
            model.gate.clear()
            streams = [engine.add_request(PROMPTS[0], HOT) for _ in range(3)]
            for _ in range(2):
                with pytest.raises(QueueFullError, match=r"^3 requests wait; legal: at most max_queue_size$"):
                    engine.add_request(PROMPTS[1], HOT)
            with pytest.raises(QueueFullError, match="3 requests wait"):
                engine.check_room()
            model.gate.set()
            for stream in streams:
                assert ids_of(await all_of(stream)) == alone(PROMPTS[0])
            engine.check_room()
            assert ids_of(await all_of(engine.add_request(PROMPTS[1], HOT))) == alone(PROMPTS[1])
            found = engine.statistics()
        assert (found.num_accepted, found.num_rejected, found.queue_seconds.count) == (4, 3, 4)

    run(test())


def test_a_reader_that_never_reads_costs_one_delta_and_stops_no_request() -> None:
    async def test() -> None:
        async with serving(ours()) as engine:
            unread = engine.add_request(PROMPTS[1], replace(HOT, n=2, max_tokens=60, logprobs=0))
            closed = engine.add_request(PROMPTS[0], HOT)
            assert ids_of(await all_of(engine.add_request(PROMPTS[2], HOT))) == alone(PROMPTS[2])
            await until(lambda: engine.statistics().request_seconds.count == 3)
            closed.close()
            assert await all_of(closed) == [], "who closes it reads no more, though there is more"
            (delta,) = await all_of(unread)
        assert delta.finished
        assert [sample.token_ids for sample in delta.outputs] == alone(PROMPTS[1], replace(HOT, n=2, max_tokens=60))
        assert all(sample.logprobs is not None and len(sample.logprobs) == 60 for sample in delta.outputs)

    run(test())


def test_a_loop_that_is_gone_stops_no_request() -> None:
    with running(ours()) as llm:
        engine = AsyncEngine(llm)

        async def look() -> RequestStream:
            stream = engine.add_request(PROMPTS[1], LONG)
            asyncio.ensure_future(stream.__anext__())  # noqa: RUF006
            await asyncio.sleep(0)
            return stream

        loop = asyncio.new_event_loop()
        stream = loop.run_until_complete(look())
        pending = asyncio.all_tasks(loop)
        loop.close()

        async def test() -> None:
            assert ids_of(await all_of(engine.add_request(PROMPTS[2], HOT))) == alone(PROMPTS[2])
            stream.close()
            await engine.drain()
            await engine.shutdown()

        run(test())
        for task in pending:
            task._log_destroy_pending = False  # type: ignore[attr-defined]


def test_the_thread_sleeps_while_nothing_is_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[None] = []
    step = Engine.step

    def counting(engine: Engine) -> Any:
        steps.append(None)
        return step(engine)

    monkeypatch.setattr(Engine, "step", counting)

    async def test() -> None:
        async with serving(ours()) as engine:
            await all_of(engine.add_request(PROMPTS[0], HOT))
            await engine.drain()
            before = len(steps)
            await asyncio.sleep(0.2)
            assert len(steps) - before <= 2

    run(test())


@pytest.mark.parametrize("host_cache_tokens", [0, 1000])
def test_statistics_count_what_happened(host_cache_tokens: int) -> None:
    async def test() -> None:
        # pages for one request and a half: some are preempted
        async with serving(ours(), kv_cache_tokens=80, max_model_len=70, host_cache_tokens=host_cache_tokens) as engine:
            start = time.monotonic()
            prompts = [prompt_of(length, seed=4) for length in (20, 30, 34)]
            await asyncio.gather(
                *(all_of(engine.add_request(prompt, replace(HOT, max_tokens=30))) for prompt in prompts)
            )
            await all_of(engine.add_request(prompts[2], HOT))
            elapsed = time.monotonic() - start
            found = engine.statistics()
        assert (found.num_accepted, found.num_rejected, found.num_failed) == (4, 0, 0)
        assert found.num_finished == {"length": 4}
        assert found.num_generated_tokens == 3 * 30 + 10
        assert found.num_prompt_tokens == 20 + 30 + 34 + 34
        assert found.num_cached_tokens == 32
        assert (found.num_host_hit_tokens > 0) == (host_cache_tokens > 0)
        assert found.num_preemptions > 0
        assert (found.num_queued, found.num_running, found.num_pages, found.num_available_pages) == (0, 0, 5, 5)
        counts = [
            histogram.count
            for histogram in (
                found.queue_seconds,
                found.first_token_seconds,
                found.inter_token_seconds,
                found.request_seconds,
            )
        ]
        assert counts == [4, 4, 3 * 29 + 9, 4]
        assert (
            found.queue_seconds.total <= found.first_token_seconds.total <= found.request_seconds.total <= 4 * elapsed
        )
        assert found.first_token_seconds.total + found.inter_token_seconds.total == pytest.approx(
            found.request_seconds.total, abs=0.1
        )

    run(test())
