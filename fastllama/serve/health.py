"""What /health says: the engine's own pulse, and a canary, one question that is asked again and again."""

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

# Seconds that a step may run. Steps take milliseconds to seconds; the first of a new shape may compile kernels, which
# takes up to a minute where no cache has them. A device that hangs never ends its step.
STEP_LIMIT = 120.0
ANSWER_LIMIT = 30.0  # seconds for the canary's 16 tokens
NUM_TOKENS = 16
# How far apart, in nats, the first answer's likeliest tokens may be where another one was drawn later. Without
# deterministic=True the batch decides in which order sums are rounded. On the bundled model, the gap between the two
# likeliest tokens differs from fp32's by 0.03 in the median of 546 places, 0.25 in 99 % and 0.38 at most in bf16, and
# by 0.06 at most in fp16. A model of 32 blocks rounds about 4 x 32 times in a row: sqrt(128) x 2^-9 = 0.02 of a logit;
# at logits of 3, two runs and two tokens, 0.13 is one standard deviation of the gap. 0.5 is a ratio of 1.6 of
# probabilities: an answer of a broken device differs where the model is surer than that.
NEAR_TIE = 0.5

CanaryResult = Literal["agreed", "disagreed", "no_answer", "failed", "skipped"]
_WRONG = {
    "disagreed": "the canary's answer is no longer the first one",
    "no_answer": f"the canary got no answer in {ANSWER_LIMIT:.0f} s, and nobody got a token",
    "failed": "the canary's request failed",
}


def verdict(health: Health | None, canary: Canary | None = None) -> tuple[int, bytes]:
    """The status and the JSON body of /health; health: None while the model is loaded, which is no fault.

    503 where the engine's thread has ended, its device failed for good, a step has run for STEP_LIMIT, or the canary
    found something. Neither a full queue nor steps that fail turn it: each of their requests got its error.
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
    """What is wrong with an engine; None for nothing."""
    if health.error is not None:
        return f"the engine is beyond repair: {shown(health.error)}"
    if not health.alive:
        return "the engine's thread has ended"
    if health.step_seconds is not None and health.step_seconds > STEP_LIMIT:
        return f"a step has run for {health.step_seconds:.0f} s; legal: at most {STEP_LIMIT:.0f} s"
    return None


class Canary:
    """Asks the engine for 16 greedy tokens every so many seconds, and compares them with its first answer.

    token_ids: of the prompt. report: is told what each request came to. It sees what no exception says: a device that
    computes wrong numbers, and an engine that takes requests and answers none. Its requests count in the engine's
    statistics and for no API key.
    """

    def __init__(
        self, engine: AsyncEngine, token_ids: Sequence[int], seconds: float, report: Callable[[CanaryResult], None]
    ) -> None:
        check_range("canary", seconds, 1)
        self._engine, self._token_ids, self._seconds, self._report = engine, tuple(token_ids), seconds, report
        # As many of the likeliest tokens as may lie within NEAR_TIE of each other.
        self._params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=5)
        self._first: list[TokenLogprob] | None = None
        self.result: CanaryResult | None = None

    @property
    def wrong(self) -> str | None:
        """What its last request found; None for nothing. Agreement heals, one that was skipped changes nothing."""
        return _WRONG.get(self.result or "")

    async def run(self) -> None:
        """Ask for ever: a task of the service, which cancels it. Raises what the engine does for an illegal prompt."""
        while True:
            await self.ask()
            await asyncio.sleep(self._seconds)

    async def ask(self) -> CanaryResult:
        """One request, and what it came to.

        A queue that is full, an engine that ends and a canary that waits behind others are no fault of the engine: such
        a request is skipped. Without an answer in time, it is one if nobody got a token meanwhile, and no step began.
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
        except (QueueFullError, RuntimeError):  # it drains, was shut down, or is beyond repair, as its health says
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
        """Whether the engine has done anything since the canary asked: a token, or a step of a long prompt."""
        step = self._engine.health().step_seconds
        began = step is not None and step < ANSWER_LIMIT
        return began or self._engine.statistics().num_generated_tokens > num_generated_tokens


async def _tokens(stream: RequestStream) -> list[TokenLogprob]:
    """The tokens of an answer of one sample. Aborts the request where it is cancelled."""
    found: list[TokenLogprob] = []
    try:
        async for delta in stream:
            for sample in delta.outputs:
                found.extend(sample.logprobs or ())
    finally:
        stream.close()
    return found


def _difference(first: Sequence[TokenLogprob], other: Sequence[TokenLogprob]) -> str | None:
    """In words, where two greedy answers differ by more than rounding; None where they do not.

    Behind the first token that differs, they are answers to two questions: nothing is compared there.
    """
    for place, (expected, found) in enumerate(zip(first, other, strict=False)):
        if expected.token_id != found.token_id:
            logprobs = dict(expected.top)
            logprob = logprobs.get(found.token_id, expected.top[-1][1])  # of one not reported: that much at most
            if expected.logprob - logprob <= NEAR_TIE:
                return None
            return f"token {place} is {found.token_id} where it was {expected.token_id}"
    return None if len(first) == len(other) else f"{len(other)} tokens where there were {len(first)}"
