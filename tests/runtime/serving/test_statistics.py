"""Histograms of plain numbers, and counts of draft tokens; test_async_engine.py checks the other counters."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from fastllama import AsyncEngine, RequestDelta, SamplingParams
from fastllama.errors import RequestError
from fastllama.runtime.drafting.speculation import Pace
from fastllama.runtime.serving.statistics import BOUNDS, Histogram
from tests.runtime.models import ours, prompt_of, running
from tests.runtime.serving.test_async_engine import all_of, run

PARAMS = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, n=2)


def test_a_histogram_counts_a_value_under_its_bound() -> None:
    histogram = Histogram()
    for value in (0.0005, 0.001, 0.0011, 1000.0):
        histogram.observe(value)
    histogram.observe(0.002, times=3)
    found = histogram.snapshot()
    assert (found.bounds, found.count, found.total) == (BOUNDS, 7, pytest.approx(1000.0086))
    assert (found.counts[:2], found.counts[-1]) == ((2, 4), 1)


async def answers(engine: AsyncEngine) -> list[list[RequestDelta]]:
    requests = [engine.add_request(prompt_of(length), PARAMS) for length in (5, 17, 30)]
    return await asyncio.gather(*map(all_of, requests))


def drafts_of(found: list[list[RequestDelta]]) -> tuple[int, int]:
    """Drafted and accepted tokens, as the requests themselves count them."""
    metrics = [deltas[-1].metrics for deltas in found]
    drafted = sum(each.num_draft_tokens for each in metrics if each is not None)
    return drafted, sum(each.num_accepted_tokens for each in metrics if each is not None)


def test_drafts_are_counted_and_each_token_of_a_step_has_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pace, "pays", lambda *args: True)

    async def test() -> None:
        with running(ours(), speculation=ours()) as llm:
            llm.generate(prompt_of(9), PARAMS)
            # What is counted before is discarded.
            async with AsyncEngine(llm) as engine:
                found = await answers(engine)
            counted = engine.statistics()
        metrics = [deltas[-1].metrics for deltas in found]
        drafted, accepted = drafts_of(found)
        assert 0 < accepted <= drafted
        assert (counted.num_draft_tokens, counted.num_accepted_tokens) == (drafted, accepted)
        assert counted.inter_token_seconds.count == 6 * 19
        # The samples of a request begin and end together.
        lasted = sum((each.finish_time or 0) - (each.first_token_time or 0) for each in metrics if each is not None)
        assert counted.inter_token_seconds.total == pytest.approx(2 * lasted, abs=0.05)

    run(test())


def test_a_request_is_queued_until_its_prompt_has_a_place_in_a_step() -> None:
    async def test() -> None:
        with running(ours(), max_num_seqs=1) as llm:
            async with AsyncEngine(llm) as engine:
                requests = [engine.add_request(prompt_of(length), replace(PARAMS, n=1)) for length in (5, 17)]
                found = await asyncio.gather(*map(all_of, requests))
        first, second = (deltas[-1].metrics for deltas in found)
        assert first is not None
        assert second is not None
        assert first.first_scheduled_time is not None
        assert second.first_scheduled_time is not None
        assert first.arrival_time <= first.first_scheduled_time <= (first.first_token_time or 0)
        assert second.first_scheduled_time >= (first.finish_time or 0), "it had the only place until then"
        waited = [(each.first_scheduled_time or 0) - each.arrival_time for each in (first, second)]
        counted = engine.statistics().queue_seconds
        assert (counted.count, counted.total) == (2, pytest.approx(sum(waited)))

    run(test())


def test_drafts_are_counted_on_where_the_engine_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pace, "pays", lambda *args: True)

    def broken(*args: Any) -> None:
        raise RuntimeError("a bug")

    async def test() -> None:
        with running(ours(), speculation=ours()) as llm:
            async with AsyncEngine(llm) as engine:
                before, scheduler = drafts_of(await answers(engine)), llm.engine.scheduler
                with monkeypatch.context() as patch:
                    patch.setattr(llm.engine.scheduler, "commit", broken)
                    with pytest.raises(RequestError):
                        await all_of(engine.add_request(prompt_of(5), replace(PARAMS, n=1)))
                after = drafts_of(await answers(engine))
                assert llm.engine.scheduler is not scheduler
            counted = engine.statistics()
        # When requests come together in a step depends on the clock, and with that how many drafts count.
        assert counted.num_draft_tokens == before[0] + after[0]
        assert counted.num_accepted_tokens == before[1] + after[1] > before[1] > 0

    run(test())
