"""An AsyncEngine scores prompts as its LLM does, beside others that it answers."""

from __future__ import annotations

import asyncio

import pytest
import torch

from fastllama import LLM, AsyncEngine, ScoreOutput
from fastllama.errors import RequestError
from tests.runtime.models import ours, running
from tests.runtime.test_score import CHOICES, CONTEXT, GREEDY, bits


def test_an_async_engine_scores_what_an_llm_does() -> None:
    async def scores(llm: LLM) -> list[ScoreOutput]:
        async with AsyncEngine(llm) as engine:
            generated = engine.generate(CONTEXT, GREEDY)
            each = [engine.score(choice, len(CONTEXT), top_logprobs=1) for choice in CHOICES]
            *found, output = await asyncio.gather(*each, generated)
            assert len(output.outputs[0].token_ids) == 12
            counts = engine.statistics()
            assert counts.num_generated_tokens == 12
            assert (counts.num_accepted, counts.num_running, counts.num_queued) == (5, 0, 0)
            return found

    with running(ours(dtype=torch.bfloat16), deterministic=True) as llm:
        expected = llm.score(CHOICES, len(CONTEXT), top_logprobs=1)
        llm.reset_prefix_cache()
        assert bits(asyncio.run(scores(llm))) == bits(expected)


def test_an_async_score_raises_what_went_wrong() -> None:
    async def scores(llm: LLM) -> None:
        async with AsyncEngine(llm) as engine:
            with pytest.raises(ValueError, match="start is 9; legal: 1 to 2"):
                await engine.score([5, 6, 7], 9)
            with pytest.raises(TypeError, match=r"AsyncEngine.score got an unknown option 'strat'"):
                await engine.score([5, 6, 7], strat=1)
            with pytest.raises(RequestError, match="deadline") as late:
                await engine.score(CHOICES[0], deadline=0)
            assert late.value.reason == "deadline"
            request = asyncio.ensure_future(engine.score(CHOICES[0], request_id="mine"))
            await asyncio.sleep(0)
            engine.abort("mine")
            with pytest.raises(RequestError, match="was aborted"):
                await request
            request = asyncio.ensure_future(engine.score(CHOICES[0]))
            await asyncio.sleep(0)
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request
            assert len((await engine.score(CHOICES[0])).logprobs) == 52

    with running(ours(), max_num_batched_tokens=16, max_num_seqs=2) as llm:
        asyncio.run(scores(llm))
