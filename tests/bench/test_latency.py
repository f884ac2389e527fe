"""Poisson arrivals: every request and every token is timed, and requests arrive at the given rate."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from fastllama import LLM
from fastllama.bench import latency
from fastllama.bench.latency import arrivals
from tests.cli.models import random_model

TOKENS = 5


@pytest.mark.parametrize("rate", [40.0, 4000.0])
def test_every_token_is_a_sample(rate: float) -> None:
    prompts = [[3 + i] * (1 + i % 7) for i in range(24)]
    with LLM(random_model(), max_model_len=32, kv_cache_tokens=2048, max_num_seqs=4) as llm:
        start = time.perf_counter()
        run = asyncio.run(arrivals(llm, prompts, TOKENS, rate, random.Random(0)))
        seconds = time.perf_counter() - start
    assert run["rate"] == rate
    assert len(run["first_token_seconds"]) == len(prompts)
    assert len(run["inter_token_seconds"]) == len(prompts) * (TOKENS - 1)
    assert min(run["first_token_seconds"]) > 0
    assert min(run["inter_token_seconds"]) >= 0
    draws = random.Random(0)
    last_arrival = sum(draws.expovariate(rate) for _ in prompts)
    assert seconds > last_arrival
    # None can have taken longer than all of them together did.
    assert max(run["first_token_seconds"]) + max(run["inter_token_seconds"]) < seconds


def test_more_requests_may_come_at_once_than_an_engine_usually_queues() -> None:
    prompts = [[3]] * 1100  # AsyncEngine's own bound is 1024
    with LLM(random_model(num_hidden_layers=1), max_model_len=8, kv_cache_tokens=1024) as llm:
        run = asyncio.run(arrivals(llm, prompts, 2, 1e9, random.Random(0)))
    assert len(run["first_token_seconds"]) == len(run["inter_token_seconds"]) == len(prompts)


def test_tokens_that_come_together_are_as_many_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    class Engine:
        """Each answer comes in deltas of 2, 3, 0 and 1 tokens, a while apart."""

        def __init__(self, llm: Any, max_queue_size: int) -> None:
            assert max_queue_size == 2

        async def __aenter__(self) -> Engine:
            return self

        async def __aexit__(self, *error: object) -> None:
            """The stand-in has nothing to shut down."""

        async def add_request(self, prompt: list[int], params: Any) -> AsyncIterator[Any]:
            for count in (2, 3, 0, 1):
                await asyncio.sleep(0.03)
                yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=[7] * count)])

    monkeypatch.setattr(latency, "AsyncEngine", Engine)
    run = asyncio.run(arrivals(None, [[1], [2]], 6, 1e6, random.Random(0)))  # type: ignore[arg-type]
    assert len(run["first_token_seconds"]) == 2
    gaps = sorted(run["inter_token_seconds"])
    assert len(gaps) == 2 * 5
    assert gaps[:2] == [0, 0]  # the second token of each came with the first
    assert sum(gaps) >= 2 * 2.9 * 0.03  # and the last three pauses, the one without a token included
    assert min(gaps[2:]) >= 0.009
