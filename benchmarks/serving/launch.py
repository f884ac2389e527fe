"""Entry of a measured process: `fastllama serve`, or an AsyncEngine with its readers, under equal settings.

python -m benchmarks.serving.launch SETTINGS serve [OPTION ...]
python -m benchmarks.serving.launch SETTINGS direct

At SIGUSR1 a server reports its memory and the number of live request objects.

SETTINGS: the fields of Settings as JSON. `serve` is the subcommand, with its options. `direct` reads bursts from
standard input, a JSON object a line, and answers each with a line: see `answer`.
"""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import socket
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from benchmarks.serving.samples import PAUSE, PROBE, Burst, Sample
from benchmarks.serving.settings import OBJECTS, REPORT, Settings
from benchmarks.soak import resident_megabytes
from fastllama import LLM, AsyncEngine, LlamaForCausalLM, SamplingParams
from fastllama.layers.batch import BatchMeta, KVCache
from fastllama.runtime.device.runner import Runner
from fastllama.runtime.device.sampler import PendingTokens, SampledToken

SEND_BUFFER = 16384  # bytes, which the kernel doubles; by default it buffers up to 4 MB for a client that does not read


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
    """Replace the model by an asynchronous device, like a GPU, that takes `seconds` for each step.

    The host prepares and launches a step while the previous one runs, and then waits for its tokens without the GIL.
    Nothing is computed: every token is the same.
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
    """Set the server's timeout for slow clients, and a small send buffer for what they do not read."""
    from fastllama.serve import service
    from fastllama.serve.protocol import LimitedProtocol

    made = LimitedProtocol.connection_made

    def connection_made(protocol: LimitedProtocol, transport: asyncio.Transport) -> None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        made(protocol, transport)

    LimitedProtocol.connection_made = connection_made  # type: ignore[method-assign, assignment]
    LimitedProtocol.header_seconds = LimitedProtocol.discard_seconds = LimitedProtocol.stall_seconds = seconds
    service.ServiceLimits = partial(service.ServiceLimits, body_seconds=seconds)  # type: ignore[assignment,misc]


def report(number: int, frame: FrameType | None) -> None:
    """Signal handler: write a line to standard error, REPORT and JSON."""
    for _ in range(2):  # an object that a finalizer puts into an unreachable queue lives until the next collection
        gc.collect()
    objects = Counter(type(each).__name__ for each in gc.get_objects())
    found = {
        "megabytes": resident_megabytes(),
        "blocks": sys.getallocatedblocks(),
        "objects": {name: objects[name] for name in OBJECTS},
    }
    print(f"{REPORT}{json.dumps(found)}", file=sys.stderr, flush=True)


async def answer(engine: AsyncEngine, burst: Burst) -> Sample:
    """Run a burst whose streams are read in this process, on the server's kind of event loop."""
    params = SamplingParams(max_tokens=burst.tokens, temperature=0.0, ignore_eos=True)

    async def read(prompt: str) -> list[float]:
        times = [time.perf_counter()]
        async for delta in engine.add_request(prompt, params):
            times.append(time.perf_counter())
            counts.append(sum(len(output.token_ids) for output in delta.outputs))
        return times

    async def probe() -> None:
        while not (ended and probes):
            await asyncio.sleep(PAUSE)
            start = time.perf_counter()
            stream = engine.add_request(PROBE, replace(params, max_tokens=1))
            await stream.__anext__()
            probes.append(time.perf_counter() - start)

    counts: list[int] = []
    probes: list[float] = []
    ended = False
    cpu, start = time.process_time(), time.perf_counter()
    probing = asyncio.ensure_future(probe()) if burst.probed else None
    arrivals = await asyncio.gather(*(read(prompt) for prompt in burst.prompts))
    seconds, used = time.perf_counter() - start, time.process_time() - cpu
    ended = True
    if probing is not None:
        await probing
    return Sample.of(
        arrivals, seconds=seconds, cpu_seconds=used, client_cpu_seconds=0.0, tokens=sum(counts), probes=probes
    )


async def _answer_all() -> None:
    loop = asyncio.get_running_loop()
    with LLM("tiny", progress=False) as llm:
        async with AsyncEngine(llm) as engine:
            print("ready", flush=True)
            while line := await loop.run_in_executor(None, sys.stdin.readline):
                print((await answer(engine, Burst(**json.loads(line)))).json(), flush=True)


def main() -> None:
    """Run the process that the command line specifies."""
    settings, kind, *options = sys.argv[1:]
    apply(Settings(**json.loads(settings)))
    if kind == "direct":
        asyncio.run(_answer_all())
        return
    from fastllama.cli.main import main as fastllama

    signal.signal(signal.SIGUSR1, report)

    sys.argv = ["fastllama", kind, *options]
    sys.exit(fastllama())


if __name__ == "__main__":
    main()
