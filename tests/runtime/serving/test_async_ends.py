"""How requests end: by themselves, a deadline, an abort, a drain, a shutdown; and what their streams then raise."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fastllama import AsyncEngine
from fastllama.errors import RequestError
from fastllama.runtime.planning.scheduler import Scheduler
from tests.runtime.models import ours, running
from tests.runtime.serving.test_async_engine import (
    HOT,
    LONG,
    all_of,
    alone,
    gated,
    ids_of,
    joined,
    run,
    serving,
    until,
    until_it_fails,
)
from tests.runtime.serving.test_async_faults import failure_of
from tests.runtime.test_engine import PROMPTS, tokens_of
from tests.runtime.test_generation import Pieces


@pytest.mark.parametrize("deadline", [0, 0.05])
def test_a_deadline_ends_what_runs_and_what_waits(deadline: float) -> None:
    async def test() -> None:
        model = gated()
        async with serving(model, max_num_seqs=1) as engine:
            model.gate.clear()
            streams = [engine.add_request(PROMPTS[k], LONG, deadline=deadline) for k in (0, 1)]
            free = engine.add_request(PROMPTS[2], HOT, deadline=1000)
            await asyncio.sleep(0.1)
            model.gate.set()
            for stream in streams:
                last = (await all_of(stream))[-1]
                assert last.finished
                assert [sample.finish_reason for sample in last.outputs] == ["deadline"]
            assert ids_of(await all_of(free)) == alone(PROMPTS[2])
            assert engine.statistics().num_finished == {"deadline": 2, "length": 1}

    run(test())


def test_abort_all_ends_everything_and_nothing_later() -> None:
    async def test() -> None:
        model = gated()
        async with serving(model, max_num_seqs=2) as engine:
            model.steps = 3
            streams = [engine.add_request(prompt, LONG) for prompt in PROMPTS]
            await streams[0].__anext__()
            await until(lambda: not model.gate.is_set())
            engine.abort_all()
            model.gate.set()
            later = engine.add_request(PROMPTS[1], HOT)
            for stream in streams:
                deltas = await until_it_fails(stream, r"^request '\d' was aborted: AsyncEngine.abort_all was called$")
                assert joined(deltas)[0].finish_reason == "abort"
                assert deltas[-1].finished
            assert ids_of(await all_of(later)) == alone(PROMPTS[1])

    run(test())


def test_drain_finishes_what_was_accepted_and_refuses_the_rest() -> None:
    async def test() -> None:
        async with serving(ours()) as engine:
            streams = [engine.add_request(prompt, HOT) for prompt in PROMPTS]
            drains = asyncio.gather(engine.drain(), engine.drain())
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match=r"^this AsyncEngine drains; make a new one$"):
                engine.add_request(PROMPTS[0], HOT)
            await drains
            assert engine.statistics().num_finished == {"length": 3}
            await engine.drain()
            for stream, prompt in zip(streams, PROMPTS, strict=True):
                assert ids_of(await all_of(stream)) == alone(prompt)

    run(test())


def test_shutdown_aborts_and_may_come_twice() -> None:
    async def test() -> None:
        model = gated()
        with running(model) as llm:
            engine = AsyncEngine(llm)
            model.steps = 3
            stream = engine.add_request(PROMPTS[1], LONG)
            await stream.__anext__()
            await until(lambda: not model.gate.is_set())
            draining = asyncio.ensure_future(engine.drain())
            shutdowns = [asyncio.ensure_future(engine.shutdown()) for _ in range(2)]
            await asyncio.sleep(0.01)
            model.gate.set()
            await asyncio.gather(*shutdowns)
            await engine.shutdown()
            await draining
            await engine.drain()
            deltas = await until_it_fails(stream, "^request '0' was aborted: the engine was shut down$")
            assert joined(deltas)[0].finish_reason == "abort"
            with pytest.raises(RuntimeError, match=r"^this AsyncEngine was shut down; make a new one$"):
                engine.add_request(PROMPTS[0], HOT)
            engine.abort_all()
            stream.close()
            assert [tokens_of(output) for output in llm.generate(PROMPTS, HOT)] == [alone(p) for p in PROMPTS]

    run(test())


def test_an_abort_by_id_ends_that_one_after_its_deltas() -> None:
    async def test() -> None:
        model = gated()
        async with serving(model) as engine:
            model.steps = 3
            streams = [engine.add_request(PROMPTS[1], LONG, request_id=name) for name in ("mine", "yours")]
            first = await streams[0].__anext__()
            await until(lambda: not model.gate.is_set())
            engine.abort("mine")
            model.gate.set()
            engine.abort("unknown")
            deltas = await until_it_fails(streams[0], "^request 'mine' was aborted: AsyncEngine.abort was called$")
            (begun,) = ids_of([first, *deltas])
            assert begun == alone(PROMPTS[1], LONG)[0][: len(begun)]
            assert streams[0].output().outputs[0].token_ids == begun
            engine.abort("mine")
            assert ids_of(await all_of(streams[1])) == alone(PROMPTS[1], LONG)
            assert engine.statistics().num_finished == {"abort": 1, "length": 1}

    run(test())


def test_an_abort_has_a_reason_and_differs_from_a_failure() -> None:
    async def test() -> None:
        model = gated()
        async with serving(model, max_num_seqs=1) as engine:
            model.gate.clear()
            streams = [engine.add_request(PROMPTS[1], LONG, request_id=name) for name in ("running", "queued", "last")]
            engine.abort("running", "its client has gone")
            engine.abort("queued", why="its client has gone")
            engine.abort_all("the server stops")
            model.gate.set()
            for stream, why in zip(streams, ("its client has gone",) * 2 + ("the server stops",), strict=True):
                failure = await failure_of(stream)
                assert str(failure) == f"request {stream.request_id!r} was aborted: {why}"
                assert (failure.reason, failure.__cause__) == ("abort", None)

    run(test())


@pytest.mark.parametrize("deadline", [10**400, math.inf, 1e300, np.float64("inf"), np.float32(1e9), np.int64(100)])
def test_a_deadline_far_away_is_as_none(deadline: Any) -> None:
    async def test() -> None:
        async with serving(ours()) as engine:
            assert ids_of(await all_of(engine.add_request(PROMPTS[1], HOT, deadline=deadline))) == alone(PROMPTS[1])

    run(test())


@pytest.mark.parametrize("deadline", [-1, -(10**400), math.nan, -math.inf, "1", np.float32("nan"), True])
def test_what_is_no_deadline_is_refused(deadline: Any) -> None:
    async def test() -> None:
        async with serving(ours()) as engine:
            with pytest.raises((TypeError, ValueError), match=r"^deadline (is|must be) "):
                engine.add_request(PROMPTS[1], HOT, deadline=deadline)
            assert engine.statistics().num_accepted == 0

    run(test())


def test_a_second_reader_is_refused_and_the_first_reads_on() -> None:
    async def test() -> None:
        model = gated()
        async with serving(model) as engine:
            model.gate.clear()
            stream = engine.add_request(PROMPTS[1], HOT)
            reader = asyncio.ensure_future(all_of(stream))
            await asyncio.sleep(0)
            with pytest.raises(
                RuntimeError, match=r"^a task waits for this stream's next delta already; legal: one rea"
            ):
                await stream.__anext__()
            model.gate.set()
            assert ids_of(await reader) == alone(PROMPTS[1])
            assert await all_of(stream) == [], "who comes afterwards finds the end"

    run(test())


def test_a_stream_has_its_output_when_it_was_read() -> None:
    async def test() -> None:
        model = gated()
        async with serving(model) as engine:
            model.gate.clear()
            stream = engine.add_request(PROMPTS[1], replace(HOT, n=2), request_id="mine")
            with pytest.raises(
                RuntimeError, match=r"^request 'mine' has not ended; legal: after the stream's last delta$"
            ):
                stream.output()
            model.gate.set()
            deltas = await all_of(stream)
            output = stream.output()
            assert output == stream.output()
            assert (output.request_id, output.finished) == ("mine", True)
            assert tokens_of(output) == ids_of(deltas) == alone(PROMPTS[1], replace(HOT, n=2))
            assert output.metrics == deltas[-1].metrics

    run(test())


def test_a_cancelled_wait_for_a_drain_or_a_reset_harms_no_request() -> None:
    async def test() -> None:
        model = gated()
        async with serving(model) as engine:
            model.gate.clear()
            stream = engine.add_request(PROMPTS[1], HOT)
            await until(lambda: (engine.health().step_seconds or 0) > 0.02)
            for wait in (engine.reset_prefix_cache, lambda: engine.update_weights({}), engine.drain):
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(wait(), 0.05)
            model.gate.set()
            assert ids_of(await all_of(stream)) == alone(PROMPTS[1])
            await engine.drain()
            assert engine.statistics().num_failed == 0

    run(test())


def test_a_stream_of_an_llm_reports_why_it_ended_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Aborted by its id; ended by what broke into the bookkeeping of its neighbour; and one that ends by itself."""
    letters = Pieces([bytes([97 + n]) for n in range(26)])
    with running(ours(), tokenizer=letters) as llm:
        whole = "".join(llm.stream(PROMPTS[1], HOT))
        started = llm.start(PROMPTS[1], HOT, request_id="mine")
        pieces = llm.follow(started)
        head = next(pieces)
        llm.abort("mine")
        llm.abort("mine")
        with pytest.raises(RequestError, match=r"^request 'mine' was aborted$") as aborted:
            next(pieces)
        assert aborted.value.reason == "abort"
        assert whole.startswith(head)
        first, second = (llm.stream(PROMPTS[k], HOT) for k in (1, 2))
        head = next(first)
        with monkeypatch.context() as patch:
            patch.setattr(Scheduler, "commit", lambda *_: (_ for _ in ()).throw(AssertionError("a bug")))
            with pytest.raises(AssertionError, match="a bug"):
                "".join(second)
        rest: list[str] = []
        with pytest.raises(RequestError, match=r"failed: RequestError\(.*AssertionError\('a bug'\)") as raised:
            rest.extend(first)
        assert raised.value.reason == "error"
        assert "a step was interrupted by" in str(raised.value.__cause__)
        assert whole.startswith(head + "".join(rest))
        assert "".join(llm.stream(PROMPTS[1], HOT)) == whole
