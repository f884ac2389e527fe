"""Requests that come together, and requests that come when they like: throughput and latency of the runtime.

python -m benchmarks.serving [--model tiny] [--dtype float32] [--requests 32] [--tokens 32] [--rounds 3]
    [--peers generate generate_batch] [--loads 0.25 0.5 0.75] [--output FILE] [--plot FILE]

Throughput: prompts of 8 to 400 tokens, all there at the start, each answered greedily with as many tokens, by the
runtime and on the same weights by transformers: `generate` on one padded batch, and `generate_batch`, its continuous
batching. They take turns, after one round that is not counted.
Latency: requests that arrive at random (a Poisson process) at a share of that throughput, through AsyncEngine: time to
the first token, and from one token of a request to the next.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

import fastllama
from fastllama import LLM, AsyncEngine, SamplingParams
from fastllama.bench.environment import environment, write_record
from fastllama.io.hub import resolve_model

OURS = "fastllama"
PERCENTILES = (50, 90, 99)
Prompts = list[list[int]]
Contender = Callable[[Prompts, int], Prompts]


def prompts_of(count: int, vocab_size: int, generator: random.Random) -> Prompts:
    """Random token ids, of lengths whose logarithms are spread evenly."""
    lengths = [round(8 * 50 ** generator.random()) for _ in range(count)]
    return [[generator.randrange(3, vocab_size) for _ in range(length)] for length in lengths]


def ours(llm: LLM, prompts: Prompts, tokens: int) -> Prompts:
    """What the runtime answers."""
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params)]


def generate(model: transformers.LlamaForCausalLM, prompts: Prompts, tokens: int) -> Prompts:
    """What transformers does with one batch, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        found = model.generate(ids, attention_mask=mask, generation_config=_greedy(model, tokens))
    answers: Prompts = found[:, longest:].tolist()
    return answers


def generate_batch(model: transformers.LlamaForCausalLM, prompts: Prompts, tokens: int) -> Prompts:
    """What transformers does by continuous batching."""
    found = model.generate_batch(inputs=prompts, generation_config=_greedy(model, tokens), progress_bar=False)
    by_prompt = {tuple(output.prompt_ids): list(output.generated_tokens) for output in found.values()}
    return [by_prompt[tuple(prompt)] for prompt in prompts]


PEERS: dict[str, Callable[..., Prompts]] = {"generate": generate, "generate_batch": generate_batch}


def _greedy(model: transformers.LlamaForCausalLM, tokens: int) -> transformers.GenerationConfig:
    nothing = model.config.vocab_size  # ends an answer
    return transformers.GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=nothing, pad_token_id=0)


def throughput(contenders: dict[str, Contender], prompts: Prompts, tokens: int, rounds: int) -> dict[str, Any]:
    """Of each contender every round's seconds, requests a second, and how many answers are not ours."""
    found: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in contenders}
    expected: Prompts = []
    for number in range(1 + rounds):
        for name, answer in contenders.items():
            start = time.perf_counter()
            answers = answer(prompts, tokens)
            seconds = time.perf_counter() - start
            expected = expected or answers
            if number:
                found[name]["seconds"].append(seconds)
            found[name]["different"] = sum(a != b for a, b in zip(answers, expected, strict=True))
    for figures in found.values():
        figures["requests_per_second"] = len(prompts) / statistics.median(figures["seconds"])
    return found


async def arrivals(llm: LLM, prompts: Prompts, tokens: int, rate: float, generator: random.Random) -> dict[str, Any]:
    """Seconds to first tokens, and between tokens, where so many requests a second arrive."""
    first: list[float] = []
    between: list[float] = []
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)

    async def client(prompt: list[int], wait: float) -> None:
        await asyncio.sleep(wait)
        last = start = time.perf_counter()
        async for delta in engine.add_request(prompt, params):
            now = time.perf_counter()
            if last == start:
                first.append(now - start)
            else:
                gained = sum(len(output.token_ids) for output in delta.outputs)
                between.extend([(now - last) / gained] * gained if gained else [])
            last = now

    wait, waits = 0.0, []
    for _ in prompts:
        wait += generator.expovariate(rate)
        waits.append(wait)
    async with AsyncEngine(llm) as engine:
        await asyncio.gather(*map(client, prompts, waits))
    return {"rate": rate, "first_token_seconds": first, "inter_token_seconds": between}


def percentiles(values: list[float]) -> list[float]:
    """PERCENTILES of some values."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return [cuts[percent - 1] for percent in PERCENTILES]


def plot(path: Path, runs: list[dict[str, Any]]) -> None:
    """Both latencies by rate, a line for each percentile."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, (name, title) in zip(
        figure.subplots(1, 2), (("first", "to the first token"), ("inter", "from token to token")), strict=True
    ):
        lines = zip(*(percentiles(run[f"{name}_token_seconds"]) for run in runs), strict=True)
        for percent, line in zip(PERCENTILES, lines, strict=True):
            axes.plot([run["rate"] for run in runs], [1000 * value for value in line], "o-", label=f"p{percent}")
        axes.set(title=f"Time {title}", xlabel="requests a second", ylabel="ms", ylim=(0, None))
        axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print a line for each figure, write the files that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a Hugging Face folder, or tiny")
    parser.add_argument("--dtype", default="float32", help="in 16 bits answers may differ by ties")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--loads", nargs="*", type=float, default=[0.25, 0.5, 0.75], help="shares of the throughput")
    parser.add_argument("--output", type=Path, help="where to write conditions and every sample as JSON")
    parser.add_argument("--plot", type=Path, help="where to draw the latencies, as PNG or SVG")
    options = parser.parse_args()
    generator, path = random.Random(0), resolve_model(options.model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, options.dtype)).eval()
    with LLM(path, dtype=options.dtype, max_num_seqs=options.requests, quantization=None, progress=False) as llm:
        prompts = prompts_of(options.requests, llm.config.vocab_size, generator)
        contenders: dict[str, Contender] = {OURS: partial(ours, llm)}
        contenders |= {f"transformers {name}": partial(PEERS[name], theirs) for name in options.peers}
        found = throughput(contenders, prompts, options.tokens, options.rounds)
        rate = found[OURS]["requests_per_second"]
        for name, figures in found.items():
            own = figures["requests_per_second"]
            print(f"{name}: {own:.2f} requests/s, ours {rate / own:.2f} times; {figures['different']} answers differ")
        runs = []
        for load in options.loads:
            fresh = prompts_of(2 * options.requests, llm.config.vocab_size, generator)
            run = asyncio.run(arrivals(llm, fresh, options.tokens, load * rate, generator))
            runs.append({"load": load, **run})
            for name in ("first", "inter"):
                cut = ", ".join(
                    f"p{percent} {1000 * value:.1f} ms"
                    for percent, value in zip(PERCENTILES, percentiles(run[f"{name}_token_seconds"]), strict=True)
                )
                print(f"{load:.0%} of it, {run['rate']:.2f} requests/s, {name}-token time: {cut}")
    if options.output:
        conditions = {key: str(value) for key, value in vars(options).items() if key not in ("output", "plot")}
        conditions |= {"threads": torch.get_num_threads(), "fastllama": fastllama.__version__}
        record = {"environment": environment(), "conditions": conditions, "throughput": found, "arrivals": runs}
        write_record(options.output, {"benchmark": "serving", **record})
    if options.plot:
        plot(options.plot, runs)


if __name__ == "__main__":
    main()
