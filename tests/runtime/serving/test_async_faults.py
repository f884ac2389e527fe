"""The asynchronous engine under faults: each ends the requests it concerns, with its cause, and the thread lives."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastllama.errors import RequestError
from fastllama.layers.batch import BatchMeta, KVCache
from fastllama.runtime.planning.scheduler import Scheduler
from fastllama.runtime.serving.async_engine import RequestStream
from tests.runtime.models import ours, prompt_of
from tests.runtime.planning.test_isolation import CURSED, cursed
from tests.runtime.serving.test_async_engine import (
    HOT,
    LONG,
    all_of,
    alone,
    ids_of,
    joined,
    run,
    serving,
    until_it_fails,
)
from tests.runtime.test_engine import PROMPTS


async def failure_of(stream: RequestStream) -> RequestError:
    """The exception of a stream, raised once, after its last delta."""
    with pytest.raises(RequestError) as raised:
        await all_of(stream)
    assert await all_of(stream) == [], "once is enough"
    return raised.value


def test_a_fault_ends_one_request_with_its_cause() -> None:
    async def test() -> None:
        async with serving(cursed()) as engine:
            others = [asyncio.ensure_future(all_of(engine.add_request(prompt, HOT))) for prompt in PROMPTS]
            error = await failure_of(engine.add_request([*prompt_of(20, seed=9), CURSED], HOT))
            assert (repr(error.__cause__), error.reason) == ("RuntimeError('cursed')", "error")
            assert [ids_of(await other) for other in others] == [alone(prompt) for prompt in PROMPTS]
            found = engine.statistics()
        assert (found.num_failed, found.num_finished) == (1, {"length": 3, "error": 1})

    run(test())


def test_what_was_read_before_a_fault_is_true() -> None:
    async def test() -> None:
        params = replace(HOT, logit_bias=None)
        (whole,) = alone(PROMPTS[0], params)
        model = cursed(token=whole[4])
        assert whole[4] not in (*PROMPTS[0], *whole[:4], 0)
        async with serving(model) as engine:
            stream, deltas = engine.add_request(PROMPTS[0], params), []
            with suppress(RequestError):
                async for delta in stream:
                    deltas.append(delta)
        assert ids_of(deltas) == [whole[:5]]
        assert not any(delta.finished for delta in deltas)

    run(test())


def test_a_fault_of_everybody_leaves_the_thread_alive() -> None:
    async def test() -> None:
        model = cursed()
        async with serving(model, max_num_seqs=4) as engine:
            model.always = True
            for stream in [engine.add_request(prompt, replace(HOT, n=2)) for prompt in PROMPTS * 2]:
                assert repr((await failure_of(stream)).__cause__) == "RuntimeError('cursed')"
            model.always = False
            assert ids_of(await all_of(engine.add_request(PROMPTS[1], HOT))) == alone(PROMPTS[1])

    run(test())


@pytest.mark.parametrize("error", [AssertionError("a bug"), SystemExit()])
def test_a_bug_in_the_bookkeeping_fails_all_and_the_engine_starts_anew(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with serving(ours()) as engine:
            streams = [engine.add_request(prompt, LONG) for prompt in PROMPTS]
            for stream in streams:
                await stream.__anext__()
            with monkeypatch.context() as patch:
                patch.setattr(Scheduler, "commit", lambda *_: (_ for _ in ()).throw(error))
                for stream in streams:
                    assert (await failure_of(stream)).__cause__ is error
            assert engine.statistics().num_failed == 3
            assert ids_of(await all_of(engine.add_request(PROMPTS[1], HOT))) == alone(PROMPTS[1])

    run(test())


def test_a_logit_that_is_no_number_ends_one_request_in_words() -> None:
    async def test() -> None:
        model = ours()
        forward = model.forward

        def broken(ids: Tensor, batch: BatchMeta, kv: KVCache) -> Tensor:
            logits = forward(ids, batch, kv)
            return torch.where((batch.positions[batch.logits_rows] == 22)[:, None], torch.nan, logits)

        model.forward = broken  # type: ignore[method-assign]
        async with serving(model) as engine:
            streams = [engine.add_request(prompt, HOT) for prompt in PROMPTS]
            message = "^request '1' failed: the model's logits are not finite numbers, or every token is banned$"
            readers = all_of(streams[0]), until_it_fails(streams[1], message), all_of(streams[2])
            found = await asyncio.gather(*readers)
        end = joined(found[1])[0]
        why = "the model's logits are not finite numbers, or every token is banned"
        assert (end.finish_reason, end.stop_reason) == ("error", why)
        assert end.token_ids == alone(PROMPTS[1])[0][:3]
        assert [ids_of(found[k]) for k in (0, 2)] == [alone(PROMPTS[k]) for k in (0, 2)]

    run(test())
