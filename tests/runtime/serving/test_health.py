"""An engine's reported health, and its end where it is beyond repair: all requests get the cause, no new one starts."""

from __future__ import annotations

import asyncio
import gc
from dataclasses import replace

import pytest

from fastllama import AsyncEngine
from fastllama.runtime import engine as engine_module
from fastllama.runtime.planning.scheduler import Scheduler
from fastllama.runtime.serving.worker import BEYOND_REPAIR, Worker
from tests.runtime.models import ours, running
from tests.runtime.planning.test_isolation import cursed
from tests.runtime.serving.test_async_engine import HOT, LONG, all_of, alone, gated, ids_of, run, serving, until
from tests.runtime.serving.test_async_faults import failure_of
from tests.runtime.test_engine import PROMPTS, tokens_of


def test_a_step_that_hangs_is_seen_and_an_idle_engine_is_well() -> None:
    async def test() -> None:
        model = gated()
        async with serving(model) as engine:
            await until(lambda: engine.health().step_seconds is None)
            model.gate.clear()
            stream = engine.add_request(PROMPTS[0], HOT)
            await until(lambda: (engine.health().step_seconds or 0) > 0.05)
            seen = engine.health()
            assert (seen.alive, seen.failures_in_a_row, seen.error) == (True, 0, None)
            model.gate.set()
            await all_of(stream)
            await until(lambda: engine.health().step_seconds is None)
        assert not engine.health().alive

    run(test())


def test_steps_that_fail_are_counted_until_one_succeeds() -> None:
    async def test() -> None:
        model = cursed()
        async with serving(model) as engine:
            model.always = True
            for count in (1, 2):
                await failure_of(engine.add_request(PROMPTS[0], HOT))
                assert engine.health().failures_in_a_row == count
            model.always = False
            assert ids_of(await all_of(engine.add_request(PROMPTS[1], HOT))) == alone(PROMPTS[1])
            assert engine.health().failures_in_a_row == 0

    run(test())


def test_an_error_of_the_device_ends_all_with_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        gone = RuntimeError("CUDA error: an illegal memory access was encountered")
        model = cursed()
        with running(model) as llm:
            engine = AsyncEngine(llm)
            model.always = True
            monkeypatch.setattr(engine_module, "device_error", lambda device: gone)
            streams = [engine.add_request(prompt, LONG) for prompt in PROMPTS]
            draining = asyncio.ensure_future(engine.drain())
            causes = [(await failure_of(stream)).__cause__ for stream in streams]
            assert all(cause is gone or repr(cause) == "RuntimeError('cursed')" for cause in causes)
            await draining
            await engine.drain()
            await engine.shutdown()
            seen = engine.health()
            assert (seen.alive, seen.error) == (False, repr(gone))
            with pytest.raises(RuntimeError, match=r"^this AsyncEngine (has failed permanently|was shut down)"):
                engine.add_request(PROMPTS[0])
            monkeypatch.undo()
            model.always = False
            llm.engine.device_error = None

    run(test())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ends_by_what_ends_requests_reports_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        bug = AssertionError("a bug")
        model = cursed()
        with running(model) as llm:
            engine = AsyncEngine(llm)
            for owner, name in ((Scheduler, "commit"), (Worker, "_fail_all")):
                monkeypatch.setattr(owner, name, lambda *_: (_ for _ in ()).throw(bug))
            assert (await failure_of(engine.add_request(PROMPTS[0], HOT))).__cause__ is bug
            engine.worker.thread.join(60)
            seen = engine.health()
            assert (seen.alive, seen.error) == (False, "AssertionError('a bug')")
            with pytest.raises(RuntimeError, match=r"^this AsyncEngine has failed permanently: AssertionError"):
                engine.add_request(PROMPTS[0], HOT)
            monkeypatch.undo()
            await engine.shutdown()
            assert tokens_of(llm.generate(PROMPTS[1], HOT)[0]) == alone(PROMPTS[1]), "another request mends the rest"

    run(test())


def test_bookkeeping_that_fails_again_and_again_ends_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        bug = AssertionError("a bug")
        with running(ours()) as llm:
            engine = AsyncEngine(llm)
            with monkeypatch.context() as patch:
                patch.setattr(Scheduler, "commit", lambda *_: (_ for _ in ()).throw(bug))
                for count in range(1, BEYOND_REPAIR + 1):
                    assert engine.health().failures_in_a_row == count - 1
                    assert (await failure_of(engine.add_request(PROMPTS[0], HOT))).__cause__ is bug
                    gc.collect()
                await asyncio.wait_for(engine.drain(), 10)
                engine.worker.thread.join(10)
            seen = engine.health()
            assert (seen.alive, seen.failures_in_a_row, seen.error) == (False, BEYOND_REPAIR, "AssertionError('a bug')")
            with pytest.raises(RuntimeError, match=r"^this AsyncEngine has failed permanently: AssertionError"):
                engine.add_request(PROMPTS[0], HOT)
            await engine.shutdown()
            assert tokens_of(llm.generate(PROMPTS[1], replace(HOT))[0]) == alone(PROMPTS[1])

    run(test())
