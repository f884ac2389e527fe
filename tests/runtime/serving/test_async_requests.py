"""Requests of an asynchronous engine: their names, whole answers, forks; weights and caches that change under them."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastllama import SamplingParams
from fastllama.errors import RequestError
from tests.runtime.models import ours, running
from tests.runtime.serving.test_async_engine import (
    HOT,
    LONG,
    all_of,
    alone,
    gated,
    ids_of,
    run,
    serving,
    until,
    until_it_fails,
)
from tests.runtime.test_engine import PROMPTS, tokens_of

OTHER = replace(HOT, seed=4)


def test_a_name_is_of_one_unfinished_request() -> None:
    async def test() -> None:
        model = gated()
        async with serving(model) as engine:
            model.gate.clear()
            named = engine.add_request(PROMPTS[0], HOT, request_id="0")
            made = engine.add_request(PROMPTS[1], HOT)
            assert (named.request_id, made.request_id != "0") == ("0", True)
            wrong: list[tuple[Any, type[Exception]]] = [("0", ValueError), ("", ValueError), (5, TypeError)]
            for request_id, error in wrong:
                for add in (
                    lambda i: engine.add_request(PROMPTS[2], HOT, request_id=i),
                    lambda i: engine.fork(named, request_id=i),
                ):
                    with pytest.raises(error, match=f"^request_id is {request_id!r}; legal: a "):
                        add(request_id)
            assert engine.statistics().num_accepted == 2
            model.gate.set()
            assert ids_of(await all_of(named)) == alone(PROMPTS[0])
            assert ids_of(await all_of(made)) == alone(PROMPTS[1])
            again = engine.add_request(PROMPTS[2], HOT, request_id="0")
            assert ids_of(await all_of(again)) == alone(PROMPTS[2])
            assert again.output().request_id == "0"

    run(test())


def test_a_name_is_free_again_when_its_request_was_aborted() -> None:
    async def test() -> None:
        model = gated()
        async with serving(model) as engine:
            for prompt in PROMPTS:
                model.steps = 2
                stream = engine.add_request(prompt, LONG, request_id="mine")
                await stream.__anext__()
                await until(lambda: not model.gate.is_set())
                engine.abort("mine")
                model.gate.set()
                await until_it_fails(stream, "^request 'mine' was aborted")
            model.steps = -1
            assert ids_of(await all_of(engine.add_request(PROMPTS[1], HOT, request_id="mine"))) == alone(PROMPTS[1])

    run(test())


def test_a_whole_answer_is_what_llm_generates() -> None:
    async def test() -> None:
        params = replace(HOT, n=2, logprobs=1)
        with running(ours()) as llm:
            (right,) = llm.generate(PROMPTS[1], params)
        model = gated()
        async with serving(model) as engine:
            answers = [engine.generate(PROMPTS[1], params, request_id=name) for name in ("a", "b")]
            found = await asyncio.gather(*answers)
            assert [output.request_id for output in found] == ["a", "b"]
            for output in found:
                assert (tokens_of(output), output.finished) == (tokens_of(right), True)
                assert output.prompt_token_ids == right.prompt_token_ids
            late = await engine.generate(PROMPTS[1], HOT, deadline=0)
            assert [sample.finish_reason for sample in late.outputs] == ["deadline"]
            fails = asyncio.ensure_future(engine.generate(PROMPTS[1], LONG, request_id="c"))
            model.gate.clear()
            await asyncio.sleep(0)
            engine.abort("c")
            model.gate.set()
            with pytest.raises(RequestError, match=r"^request 'c' was aborted: AsyncEngine.abort was called$"):
                await fails
            with pytest.raises(TypeError, match=r"^AsyncEngine.add_request got an unknown option 'zzz'"):
                await engine.generate(PROMPTS[1], HOT, zzz=1)

    run(test())


def test_a_fork_begins_with_what_came_and_goes_its_own_way() -> None:
    async def test() -> None:
        with running(ours()) as llm:
            first = llm.engine.add_request(PROMPTS[1], HOT)
            for _ in range(4):
                llm.engine.step()
            right = llm.engine.fork(first, OTHER)
            while not (first.finished and right.finished):
                llm.engine.step()
            own = tokens_of(right.output())[0]
        async with serving(ours()) as engine:
            stream = engine.add_request(PROMPTS[1], HOT)
            forks = [engine.fork(stream), engine.fork(stream, OTHER, request_id="other", deadline=1000)]
            forks.append(engine.fork(forks[1]))
            found = await asyncio.gather(*map(all_of, (stream, *forks)))
            assert [ids_of(deltas) for deltas in found[:2]] == [alone(PROMPTS[1])] * 2
            assert ids_of(found[2]) == ids_of(found[3]) == alone(PROMPTS[1], OTHER), "forked before its first token"
            assert forks[1].output().request_id == "other"
        model = gated()
        async with serving(model) as engine:
            model.steps = 3
            stream = engine.add_request(PROMPTS[1], HOT)
            await stream.__anext__()
            await until(lambda: not model.gate.is_set())
            fork = engine.fork(stream, OTHER)
            model.gate.set()  # the fourth step, after which it is forked
            deltas = await all_of(fork)
            assert deltas[0].outputs[0].token_ids[:4] == alone(PROMPTS[1])[0][:4], "what the other has generated"
            assert ids_of(deltas) == [own]
            assert ids_of(await all_of(engine.add_request(PROMPTS[1], HOT))) == alone(PROMPTS[1])
        assert own != alone(PROMPTS[1])[0]

    run(test())


def test_what_cannot_be_forked_is_raised_by_the_stream() -> None:
    async def test() -> None:
        async with serving(ours()) as engine:
            ended = engine.add_request(PROMPTS[1], HOT, request_id="mine")
            await all_of(ended)
            await until_it_fails(engine.fork(ended), "request 'mine', which has ended or is another engine's; legal: ")
            several = engine.add_request(PROMPTS[1], replace(HOT, n=2))
            await until_it_fails(engine.fork(several), "n of the request to fork is 2; legal: 1")
            assert len(await all_of(several)) > 0
            for wrong in (5, "mine", None):
                with pytest.raises(
                    TypeError, match=rf"^stream is {wrong!r}; legal: what AsyncEngine.add_request returns$"
                ):
                    engine.fork(wrong)  # type: ignore[arg-type]
            with pytest.raises(TypeError, match=r"^params is 5; legal: SamplingParams or None$"):
                engine.fork(ended, 5)  # type: ignore[arg-type]
            assert engine.statistics().num_queued == 0

    run(test())


def test_a_prefix_cache_is_forgotten_between_two_steps() -> None:
    async def test() -> None:
        async with serving(ours()) as engine:
            running_on = asyncio.ensure_future(all_of(engine.add_request(PROMPTS[2], replace(HOT, max_tokens=60))))
            cached = []
            for _ in range(2):
                for _ in range(2):
                    cached.append((await engine.generate(PROMPTS[1], HOT)).metrics.num_cached_tokens)
                await engine.reset_prefix_cache()
            assert cached == [0, 16, 0, 16]
            assert ids_of(await running_on) == alone(PROMPTS[2], replace(HOT, max_tokens=60))

    run(test())


def test_weights_are_replaced_between_two_steps() -> None:
    async def test() -> None:
        model = ours(dtype=torch.float32)
        params = SamplingParams(temperature=0, max_tokens=8)
        async with serving(model) as engine:
            before = tokens_of(await engine.generate(PROMPTS[1], params))
            weight = model.norm.weight.detach().clone()
            with pytest.raises(ValueError, match="zzz"):
                await engine.update_weights({"zzz": weight})
            flipped = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
            await engine.update_weights({"model.norm.weight": flipped})
            changed = await engine.generate(PROMPTS[1], params)
            assert changed.metrics.num_cached_tokens == 0
            assert tokens_of(changed) != before
            await engine.update_weights(iter([("model.norm.weight", weight)]))
            assert tokens_of(await engine.generate(PROMPTS[1], params)) == before
            assert engine.health().failures_in_a_row == 0

    run(test())
