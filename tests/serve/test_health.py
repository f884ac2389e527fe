"""Health: what changes it and what does not, and a canary that distinguishes a broken engine from a busy one."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest

from fastllama import LLM, AsyncEngine
from fastllama.errors import QueueFullError, RequestError
from fastllama.runtime.outputs import CompletionOutput, RequestDelta, TokenLogprob
from fastllama.runtime.params import SamplingParams
from fastllama.runtime.serving.statistics import Health, Statistics
from fastllama.serve import health as health_module
from fastllama.serve.health import NEAR_TIE, NUM_TOKENS, STEP_LIMIT, Canary, CanaryResult, verdict

WELL = Health(alive=True, step_seconds=None, failures_in_a_row=0, error=None)


def answer_of(health: Health | None, canary: Canary | None = None) -> tuple[int, dict[str, Any]]:
    status, body = verdict(health, canary)
    return status, json.loads(body)


def answer(*token_ids: int, logprobs: tuple[float, ...] = (-0.01, -4.0, -5.0), **changed: Any) -> list[TokenLogprob]:
    """Tokens with these log-probabilities of the likeliest, which are the token, the one after it, and so on."""
    tops = (tuple((token_id + place, each) for place, each in enumerate(logprobs)) for token_id in token_ids)
    return [TokenLogprob(top[0][0], top[0][1], top, **changed) for top in tops]


class FakeStream:
    """The deltas of one answer; an exception among them is raised, and None waits for ever."""

    def __init__(self, deltas: list[Any]) -> None:
        self._deltas = deltas
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[RequestDelta]:
        for delta in self._deltas:
            if isinstance(delta, Exception):
                raise delta
            if delta is None:
                await asyncio.get_running_loop().create_future()
            yield RequestDelta((CompletionOutput(0, "", (), logprobs=tuple(delta)),))

    def close(self) -> None:
        self.closed = True


@dataclass
class FakeEngine:
    """Answers in turn what it is given: a list of deltas, or what add_request raises."""

    answers: list[Any]
    now: Health = WELL
    tokens_meanwhile: int = 0
    asked: list[tuple[tuple[int, ...], SamplingParams]] = field(default_factory=list)
    streams: list[FakeStream] = field(default_factory=list)
    counted: Statistics = field(default_factory=Statistics)

    def add_request(self, prompt: tuple[int, ...], params: SamplingParams) -> FakeStream:
        self.asked.append((prompt, params))
        given = self.answers.pop(0)
        if isinstance(given, Exception):
            raise given
        self.counted.num_generated_tokens += self.tokens_meanwhile
        self.streams.append(FakeStream(given))
        return self.streams[-1]

    def statistics(self) -> Any:
        return self.counted.snapshot(num_queued=0, num_running=0, num_pages=1, num_available_pages=1)

    def health(self) -> Health:
        return self.now


def canary_of(engine: FakeEngine, results: list[CanaryResult] | None = None) -> Canary:
    report = ([] if results is None else results).append
    return Canary(cast(AsyncEngine, engine), [1, 2, 3], 60, report)


def ask(*answers: Any, **state: Any) -> tuple[Canary, FakeEngine, list[CanaryResult]]:
    """A canary that got these answers."""
    results: list[CanaryResult] = []
    engine = FakeEngine(list(answers), **state)
    canary = canary_of(engine, results)

    async def test() -> None:
        for _ in answers:
            await canary.ask()

    asyncio.run(asyncio.wait_for(test(), 60))
    return canary, engine, results


def test_an_engine_that_is_idle_or_steps_is_healthy() -> None:
    assert answer_of(WELL) == (
        200,
        {"status": "ok", "reason": None, "failures_in_a_row": 0, "step_seconds": None, "canary": None},
    )
    status, body = answer_of(replace(WELL, step_seconds=STEP_LIMIT - 1, failures_in_a_row=3))
    assert (status, body["failures_in_a_row"], body["step_seconds"]) == (200, 3, STEP_LIMIT - 1)
    assert answer_of(None)[0] == 200
    assert answer_of(None)[1]["status"] == "loading"


@pytest.mark.parametrize(
    ("health", "reason"),
    [
        (replace(WELL, alive=False), "the engine's thread has ended"),
        (
            replace(WELL, alive=False, error="CUDA error:\nlaunch"),
            "the engine has a permanent fault: CUDA error:\\nlaunch",
        ),
        (replace(WELL, step_seconds=STEP_LIMIT + 1), "a step has run for 121 s; legal: at most 120 s"),
    ],
)
def test_what_an_engine_cannot_mend_turns_health(health: Health, reason: str) -> None:
    status, body = answer_of(health)
    assert (status, body["status"], body["reason"]) == (503, "unhealthy", reason)


def test_the_canary_asks_the_same_greedy_question_each_time() -> None:
    canary, engine, results = ask([answer(7, 8)], [answer(7), answer(8)])
    assert results == ["agreed", "agreed"]
    assert engine.asked[0] == engine.asked[1]
    prompt, params = engine.asked[0]
    assert prompt == (1, 2, 3)
    assert (params.greedy, params.max_tokens, params.ignore_eos) == (True, NUM_TOKENS, True)
    assert all(stream.closed for stream in engine.streams)
    assert answer_of(WELL, canary) == (200, answer_of(WELL)[1] | {"canary": "agreed"})


def test_another_answer_is_seen_until_it_agrees_again(caplog: pytest.LogCaptureFixture) -> None:
    right, wrong = [answer(7, 8, 9)], [answer(7, 5, 9)]
    canary, _, results = ask(right, wrong, wrong)
    assert results == ["agreed", "disagreed", "disagreed"]
    status, body = answer_of(WELL, canary)
    assert (status, body["reason"]) == (503, "the canary's answer is no longer the first one")
    assert body["canary"] == "disagreed"
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "token 1 is 5 where it was 8" in record.getMessage()

    canary, _, results = ask(right, wrong, right, wrong)
    assert results == ["agreed", "disagreed", "agreed", "disagreed"]
    assert len(caplog.records) == 3, "once for each time that it turns"
    canary, _, _ = ask(right, wrong, right)
    assert canary.wrong is None


@pytest.mark.parametrize(
    ("logprobs", "found", "result"),
    [
        ((-0.7, -0.7 - NEAR_TIE + 0.01, -6.0), 9, "agreed"),
        ((-0.7, -0.7 - NEAR_TIE - 0.01, -6.0), 9, "disagreed"),
        ((-0.7, -0.8, -6.0), 10, "disagreed"),
        ((-0.7, -0.8, -6.0), 50, "disagreed"),
        ((-1.0, -1.1, -1.2), 50, "agreed"),
    ],
    ids=["near", "sure", "third", "unlisted", "all near"],
)
def test_rounding_may_choose_the_runner_up_of_a_near_tie(
    logprobs: tuple[float, ...], found: int, result: CanaryResult
) -> None:
    first = [answer(7), answer(8, logprobs=logprobs), answer(9, 10)]
    other = [answer(7), answer(found), answer(60, 70)]  # after a near tie, all may differ
    assert ask(first, other)[2] == ["agreed", result]


def test_a_shorter_answer_is_another() -> None:
    assert ask([answer(7, 8)], [answer(7)])[2] == ["agreed", "disagreed"]


def aborted() -> RequestError:
    return RequestError("request '1' was aborted: AsyncEngine.abort_all was called", reason="abort")


@pytest.mark.parametrize("busy", [QueueFullError("9 requests wait"), RuntimeError("drains"), [answer(7), aborted()]])
def test_a_busy_engine_is_not_judged(busy: Any) -> None:
    canary, _, results = ask(busy, [answer(7)], busy)
    assert results == ["skipped", "agreed", "skipped"]
    assert answer_of(WELL, canary)[1]["canary"] == "agreed"
    canary, _, _ = ask([answer(7)], [answer(5)], busy)
    assert answer_of(WELL, canary)[0] == 503, "what was seen is not forgotten"


def test_a_request_that_raises_is_a_fault(caplog: pytest.LogCaptureFixture) -> None:
    canary, _, results = ask([answer(7)], [answer(7), RequestError("the request failed: NaN logits")])
    assert results == ["agreed", "failed"]
    assert answer_of(WELL, canary)[0] == 503
    assert "NaN logits" in caplog.text


@pytest.mark.parametrize(
    ("state", "result"),
    [
        ({}, "no_answer"),
        ({"now": replace(WELL, step_seconds=60.0)}, "no_answer"),
        ({"tokens_meanwhile": 5}, "skipped"),
        ({"now": replace(WELL, step_seconds=0.0)}, "skipped"),
    ],
    ids=["idle", "one step all the time", "others get tokens", "a step of a long prompt"],
)
def test_no_answer_is_a_fault_where_no_request_gets_one(
    state: dict[str, Any], result: CanaryResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health_module, "ANSWER_LIMIT", 0.01)
    canary, engine, results = ask([answer(7), None], **state)
    assert results == [result]
    assert engine.streams[0].closed, "it must not wait in the queue for ever"
    assert answer_of(WELL, canary)[0] == (503 if result == "no_answer" else 200)


def test_it_asks_until_it_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine([[answer(7)], [answer(7)], [None]])
    canary = canary_of(engine)
    pauses = []
    sleep = asyncio.sleep

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", pause)

    async def test() -> None:
        task = asyncio.create_task(canary.run())
        while len(engine.streams) < 3:
            await sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(test(), 60))
    assert pauses == [60, 60]
    assert engine.streams[2].closed


def test_too_short_a_period_is_refused() -> None:
    with pytest.raises(ValueError, match="canary is 0; legal: at least 1"):
        Canary(cast(AsyncEngine, FakeEngine([])), [1], 0, lambda result: None)


def test_the_bundled_model_agrees_with_itself_in_any_batch_and_in_fp16_but_not_with_other_weights() -> None:
    """The first answer is fp32's: what differs in bf16 and fp16 is what NEAR_TIE is for."""
    results: list[CanaryResult] = []

    async def test() -> None:
        first = None
        for dtype in ("float32", "bfloat16", "float16"):
            with LLM("tiny", dtype=dtype, kv_cache_tokens=1024, progress=False) as llm:
                async with AsyncEngine(llm) as engine:
                    prompt = llm.tokenizer.encode("Once upon a time")
                    canary = Canary(engine, prompt, 60, results.append)
                    canary._first = first
                    company = asyncio.gather(*(engine.generate("The dog", PARAMS) for _ in range(3)))
                    await canary.ask()
                    await company
                    first = first or canary._first
                    if dtype == "float32":
                        await canary.ask()
                        head = llm.engine.model.lm_head.weight
                        await engine.update_weights({"lm_head.weight": head.flip(0).contiguous()})
                        await canary.ask()

    asyncio.run(asyncio.wait_for(test(), 60))
    assert results == ["agreed", "agreed", "disagreed", "agreed", "agreed"]


PARAMS = SamplingParams(temperature=0, max_tokens=32)
