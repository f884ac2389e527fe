"""Measures time to first token and inter-token latency of requests with random arrivals."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

from fastllama.bench.workload import Prompts
from fastllama.runtime.llm import LLM
from fastllama.runtime.params import SamplingParams
from fastllama.runtime.serving.async_engine import AsyncEngine


async def arrivals(llm: LLM, prompts: Prompts, tokens: int, rate: float, generator: random.Random) -> dict[str, Any]:
    """Seconds to first tokens, and between tokens, of Poisson arrivals at `rate` requests per second.

    Each client is a task of one AsyncEngine. Tokens of one delta count as evenly spaced since the last delta, those of
    the first delta as simultaneous: a request has one gap fewer than tokens.
    """
    first: list[float] = []
    between: list[float] = []
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)

    async def client(prompt: list[int], wait: float) -> None:
        await asyncio.sleep(wait)
        last = start = time.perf_counter()
        async for delta in engine.add_request(prompt, params):
            now = time.perf_counter()
            gained = sum(len(output.token_ids) for output in delta.outputs)
            if not gained:
                continue
            if last == start:
                first.append(now - start)
                between.extend([0.0] * (gained - 1))
            else:
                between.extend([(now - last) / gained] * gained)
            last = now

    wait, waits = 0.0, []
    for _ in prompts:
        wait += generator.expovariate(rate)
        waits.append(wait)
    async with AsyncEngine(llm, max_queue_size=len(prompts)) as engine:
        await asyncio.gather(*map(client, prompts, waits))
    return {"rate": rate, "first_token_seconds": first, "inter_token_seconds": between}
