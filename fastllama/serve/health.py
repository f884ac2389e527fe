"""The /health endpoint: the state of the engine's thread, and a canary request that is repeated and compared."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from fastllama.errors import QueueFullError, RequestError, check_range, shown
from fastllama.runtime.outputs import TokenLogprob
from fastllama.runtime.params import SamplingParams
from fastllama.runtime.serving.statistics import Health

if TYPE_CHECKING:
    from fastllama.runtime.serving.async_engine import AsyncEngine
    from fastllama.runtime.serving.stream import RequestStream

logger = logging.getLogger("fastllama")

# Most seconds of a step. Steps take milliseconds to seconds; the first of a new shape may compile kernels, up to a
# minute without cached ones. A hanging device never ends its step.
STEP_LIMIT = 120.0
ANSWER_LIMIT = 30.0  # seconds for the canary's 16 tokens
NUM_TOKENS = 16
# How many nats below the first answer's token a later answer's token may be. Without deterministic=True the batch
# decides the order of sums. On the bundled model, the gap between the two likeliest tokens differs from fp32's by 0.03
# in the median of 546 positions, 0.25 in 99 % and 0.38 at most in bf16, and by 0.06 at most in fp16. A model of 32
# blocks rounds about 4 x 32 times in a row: sqrt(128) x 2^-9 = 0.02 of a logit; at logits of 3, two runs and two
# tokens, 0.13 is one standard deviation of the gap. 0.5 is a probability ratio of 1.6: a broken device's answer differs
# where the model is surer than that.
NEAR_TIE = 0.5

CanaryResult = Literal["agreed", "disagreed", "no_answer", "failed", "skipped"]
_WRONG = {
    "disagreed": "the canary's answer is no longer the first one",
    "no_answer": f"the canary got no answer in {ANSWER_LIMIT:.0f} s, and no request got a token",
    "failed": "the canary's request failed",
}


def verdict(health: Health | None, canary: Canary | None = None) -> tuple[int, bytes]:
    """Returns the status and the JSON body of /health; health: None while the model is loaded, which is healthy.

    503 if the engine's thread has ended, its device has failed permanently, a step has run for STEP_LIMIT, or the
    canary failed. A full queue or failing steps do not count: their requests got errors.
    """
    wrong = None if health is None else _fault(health)
    if wrong is None and canary is not None:
        wrong = canary.wrong
    body = {
        "status": "unhealthy" if wrong else "loading" if health is None else "ok",
        "reason": wrong,
        "failures_in_a_row": 0 if health is None else health.failures_in_a_row,
        "step_seconds": None if health is None or health.step_seconds is None else round(health.step_seconds, 3),
        "canary": None if canary is None else canary.result,
    }
    return 503 if wrong else 200, json.dumps(body).encode()


def _fault(health: Health) -> str | None:
    """Returns what is wrong with an engine; None if nothing is."""
    if health.error is not None:
        return f"the engine has a permanent fault: {shown(health.error)}"
    if not health.alive:
        return "the engine's thread has ended"
    if health.step_seconds is not None and health.step_seconds > STEP_LIMIT:
        return f"a step has run for {health.step_seconds:.0f} s; legal: at most {STEP_LIMIT:.0f} s"
    return None


class Canary:
    """Requests 16 greedy tokens periodically, and compares them with the first answer.

    token_ids: of the prompt. report: called with each result. It detects what raises no exception: a device that
    computes wrong numbers, and an engine that accepts requests and answers none. Its requests count in the engine's
    statistics, but for no API key.
    """

    def __init__(
        self, engine: AsyncEngine, token_ids: Sequence[int], seconds: float, report: Callable[[CanaryResult], None]
    ) -> None:
        check_range("canary", seconds, 1)
        self._engine, self._token_ids, self._seconds, self._report = engine, tuple(token_ids), seconds, report
        # Enough of the likeliest tokens to include those within NEAR_TIE.
        self._params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=5)
        self._first: list[TokenLogprob] | None = None
        self.result: CanaryResult | None = None

    @property
    def wrong(self) -> str | None:
        """The last request's finding; None if all is well. An agreeing answer clears it, a skipped one does not."""
        return _WRONG.get(self.result or "")

    async def run(self) -> None:
        """Repeat the request until cancelled. Raises what the engine raises for an illegal prompt."""
        while True:
            await self.ask()
            await asyncio.sleep(self._seconds)

    async def ask(self) -> CanaryResult:
        """Send one request; returns its result.

        A full queue, an engine that is shutting down, or a canary that waits in the queue is no fault of the engine:
        the request is skipped. Without an answer in time, it has failed if no request got a token meanwhile and no step
        began.
        """
        result, detail = await self._asked()
        self._report(result)
        if result != "skipped":
            if result != self.result and result in _WRONG:
                logger.error("%s%s", _WRONG[result], detail and f": {detail}")
            self.result = result
        return result

    async def _asked(self) -> tuple[CanaryResult, str]:
        before = self._engine.statistics().num_generated_tokens
        try:
            stream = self._engine.add_request(self._token_ids, self._params)
        except (QueueFullError, RuntimeError):  # drains, was shut down, or has a permanent fault, which /health reports
            return "skipped", ""
        try:
            answer = await asyncio.wait_for(_tokens(stream), ANSWER_LIMIT)
        except asyncio.TimeoutError:
            return ("skipped" if self._advanced(before) else "no_answer"), ""
        except RequestError as error:
            return ("failed", str(error)) if error.reason == "error" else ("skipped", "")
        if self._first is None:
            self._first = answer
        difference = _difference(self._first, answer)
        return ("agreed", "") if difference is None else ("disagreed", difference)

    def _advanced(self, num_generated_tokens: int) -> bool:
        """Whether the engine has progressed since the request: a token, or a step of a long prompt."""
        step = self._engine.health().step_seconds
        began = step is not None and step < ANSWER_LIMIT
        return began or self._engine.statistics().num_generated_tokens > num_generated_tokens


async def _tokens(stream: RequestStream) -> list[TokenLogprob]:
    """Returns the tokens of a one-sample answer. Aborts the request if cancelled."""
    found: list[TokenLogprob] = []
    try:
        async for delta in stream:
            for sample in delta.outputs:
                found.extend(sample.logprobs or ())
    finally:
        stream.close()
    return found


def _difference(first: Sequence[TokenLogprob], other: Sequence[TokenLogprob]) -> str | None:
    """Describes where two greedy answers differ by more than rounding; None if they do not.

    After the first token that differs, the answers have different prefixes, and are not compared.
    """
    for place, (expected, found) in enumerate(zip(first, other, strict=False)):
        if expected.token_id != found.token_id:
            logprobs = dict(expected.top)
            logprob = logprobs.get(found.token_id, expected.top[-1][1])  # unreported: at most the last one's
            if expected.logprob - logprob <= NEAR_TIE:
                return None
            return f"token {place} is {found.token_id} where it was {expected.token_id}"
    return None if len(first) == len(other) else f"{len(other)} tokens where there were {len(first)}"
