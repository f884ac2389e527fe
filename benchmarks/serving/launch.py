"""A process that is measured: `fastllama serve`, or readers of an AsyncEngine in the process, under equal settings.

python -m benchmarks.serving.launch SETTINGS serve [OPTION ...]
python -m benchmarks.serving.launch SETTINGS direct

SETTINGS: the fields of Settings as JSON. `serve` is the subcommand, with its options. `direct` reads bursts from
standard input, a JSON object a line, and answers each with a line: see `answer`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.serving.samples import Burst, Sample
from benchmarks.serving.settings import Settings
from fastllama import LLM, AsyncEngine, LlamaForCausalLM, SamplingParams
from fastllama.layers.batch import BatchMeta, KVCache
from fastllama.runtime.device.runner import Runner
from fastllama.runtime.device.sampler import PendingTokens, SampledToken


def apply(settings: Settings) -> None:
    """Set up this process."""
    torch.set_num_threads(settings.threads)
    if settings.step_seconds is not None:
        imitate_device(settings.step_seconds)
    if settings.switch_interval is not None:
        sys.setswitchinterval(settings.switch_interval)
        sys.setswitchinterval = lambda interval: None
    if settings.stall_seconds is not None:
        limit_stalls(settings.stall_seconds)
    if settings.llm:
        initialise = LLM.__init__

        def with_arguments(llm: LLM, *args: Any, **options: Any) -> None:
            initialise(llm, *args, **(options | settings.llm))

        LLM.__init__ = with_arguments  # type: ignore[method-assign, assignment]


def imitate_device(seconds: float) -> None:
    """Make every step one of a device that runs by itself, as a GPU does, and needs so many seconds for each step.

    The host prepares and launches a step while the one before runs, and then waits for its tokens without the GIL.
    Nothing is computed: each token is the same one.
    """
    initialise, begin, read = Runner.__init__, PendingTokens.__init__, PendingTokens.read
    logits, idle_at = torch.empty(0), 0.0

    def run_ahead(runner: Runner, *args: Any, **options: Any) -> None:
        initialise(runner, *args, **options)
        runner.runs_ahead = True

    def forward(model: LlamaForCausalLM, ids: Tensor, batch: BatchMeta, kv: KVCache) -> Tensor:
        nonlocal logits
        rows = batch.logits_rows.shape[0]
        if len(logits) < rows:
            logits = torch.zeros(rows, model.config.vocab_size)
            logits[:, ord("a")] = 1.0
        return logits[:rows]

    def launched(tokens: PendingTokens, *args: Any) -> None:
        nonlocal idle_at
        begin(tokens, *args)
        idle_at = max(idle_at, time.perf_counter()) + seconds
        tokens.there_at = idle_at  # type: ignore[attr-defined]

    def wait(tokens: PendingTokens) -> list[SampledToken]:
        time.sleep(max(0.0, tokens.there_at - time.perf_counter()))  # type: ignore[attr-defined]
        return read(tokens)

    Runner.__init__ = run_ahead  # type: ignore[method-assign, assignment]
    LlamaForCausalLM.forward = forward  # type: ignore[method-assign, assignment]
    PendingTokens.__init__ = launched  # type: ignore[method-assign, assignment]
    PendingTokens.read = wait  # type: ignore[method-assign, assignment]


def limit_stalls(seconds: float) -> None:
    """Have the server hang up on slow clients so soon."""
    from fastllama.serve import service
    from fastllama.serve.protocol import LimitedProtocol

    LimitedProtocol.header_seconds = LimitedProtocol.discard_seconds = LimitedProtocol.stall_seconds = seconds
    service.ServiceLimits = partial(service.ServiceLimits, body_seconds=seconds)  # type: ignore[assignment,misc]


async def answer(engine: AsyncEngine, burst: Burst) -> Sample:
    """A burst whose streams are read in this process, on a loop as the server's."""
    params = SamplingParams(max_tokens=burst.tokens, temperature=0.0, ignore_eos=True)

    async def read(prompt: str) -> list[float]:
        times = [time.perf_counter()]
        async for delta in engine.add_request(prompt, params):
            times.append(time.perf_counter())
            counts.append(sum(len(output.token_ids) for output in delta.outputs))
        return times

    counts: list[int] = []
    cpu, start = time.process_time(), time.perf_counter()
    arrivals = await asyncio.gather(*(read(prompt) for prompt in burst.prompts))
    seconds, used = time.perf_counter() - start, time.process_time() - cpu
    return Sample.of(arrivals, seconds=seconds, cpu_seconds=used, client_cpu_seconds=0.0, tokens=sum(counts))


async def _answer_all() -> None:
    loop = asyncio.get_running_loop()
    with LLM("tiny", progress=False) as llm:
        async with AsyncEngine(llm) as engine:
            print("ready", flush=True)
            while line := await loop.run_in_executor(None, sys.stdin.readline):
                print((await answer(engine, Burst(**json.loads(line)))).json(), flush=True)


def main() -> None:
    """Be what the command line says."""
    settings, kind, *options = sys.argv[1:]
    apply(Settings(**json.loads(settings)))
    if kind == "direct":
        import uvloop

        uvloop.run(_answer_all())
        return
    from fastllama.cli.main import main as fastllama

    sys.argv = ["fastllama", kind, *options]
    sys.exit(fastllama())


if __name__ == "__main__":
    main()
