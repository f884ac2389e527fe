"""Measures throughput and latency of the runtime, compared with transformers on the same weights."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from fastllama.arithmetic import ceil_div
from fastllama.bench import peers
from fastllama.bench.environment import environment
from fastllama.bench.latency import arrivals
from fastllama.bench.text import PERCENTILES, milliseconds, table
from fastllama.bench.throughput import OURS, Contender, ours, throughput
from fastllama.bench.workload import LONGEST, SEQUENCES, SHORTEST, prompts_of
from fastllama.errors import check_choice, check_range, counted
from fastllama.io.hub import resolve_model
from fastllama.io.load import open_model
from fastllama.runtime.llm import LLM

PAGE = 64

Record = dict[str, Any]


@dataclass(frozen=True)
class RuntimeOptions:
    """Options. Raises ValueError for illegal ones.

    requests: prompts of the throughput measurement, all submitted at the start. tokens: per answer. rounds: measured
    rounds of throughput, after one for warm-up. peers: names of `peers.PEERS`. loads: arrival rates, as shares of the
    throughput. arrivals: requests per load. The others are arguments of LLM.
    """

    model: str = "tiny"
    dtype: str = "auto"
    device: str = "auto"
    quantization: str | None = "auto"
    kv_cache_dtype: str = "auto"
    deterministic: bool = False
    speculation: str | None = None
    num_draft_tokens: int = 3
    requests: int = 32
    tokens: int = 32
    rounds: int = 3
    peers: tuple[str, ...] = tuple(peers.PEERS)
    loads: tuple[float, ...] = (0.25, 0.5, 0.75)
    arrivals: int = 500

    def __post_init__(self) -> None:
        check_range("requests", self.requests, 1)
        check_range("tokens", self.tokens, 2)  # for at least one gap
        check_range("rounds", self.rounds, 1)
        check_range("arrivals", self.arrivals, 1)
        for name in self.peers:
            check_choice("peers", name, peers.PEERS)
        for load in self.loads:
            check_range("loads", load, 0.01, 100)


def measure(options: RuntimeOptions, say: Callable[[str], None]) -> Record:
    """Measure; returns the record for JSON and for `report`. `say`: called with a progress line.

    Raises the errors of LLM, ValueError where answers of this many tokens do not fit the model's context.
    """
    generator, path = random.Random(0), resolve_model(options.model)
    context = open_model(path)[0].config.context_length
    check_range("tokens", options.tokens, 2, context - SHORTEST)
    length, sequences = min(LONGEST + options.tokens, context), min(options.requests, SEQUENCES)
    longest = length - options.tokens
    with LLM(
        path,
        dtype=options.dtype,
        device=options.device,
        quantization=options.quantization,
        kv_cache_dtype=options.kv_cache_dtype,
        deterministic=options.deterministic,
        speculation=options.speculation,
        num_draft_tokens=options.num_draft_tokens,
        max_model_len=length,
        kv_cache_tokens=sequences * ceil_div(length, PAGE) * PAGE,  # no more than needed: peers need memory, too
        page_size=PAGE,
        max_num_seqs=sequences,
        progress=False,
    ) as llm:
        model = llm.engine.model
        make = partial(prompts_of, vocab_size=llm.config.vocab_size, longest=longest, generator=generator)
        contenders: dict[str, Contender] = {OURS: partial(ours, llm)}
        absent = {f"transformers {name}": peers.missing(path) for name in options.peers}
        if options.peers and not any(absent.values()):
            say("loading transformers")
            try:
                theirs = peers.load(path, model.dtype, model.device)
            except Exception as failure:  # out of memory, or a checkpoint that it cannot read
                absent = dict.fromkeys(absent, f"{type(failure).__name__}: {failure}"[:500])
            else:
                contenders |= {f"transformers {name}": partial(peers.PEERS[name], theirs) for name in options.peers}
        found = throughput(contenders, make(options.requests), options.tokens, options.rounds, say)
        contenders.clear()
        runs = []
        for load in options.loads:
            rate = load * found[OURS]["requests_per_second"]
            say(
                f"latency: {counted(options.arrivals, 'request')}, {rate:.2f} a second, {options.arrivals / rate:.0f} s"
            )
            run = asyncio.run(arrivals(llm, make(options.arrivals), options.tokens, rate, generator))
            runs.append({"load": load, **run})
        conditions = asdict(options) | {
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "quantization": llm.quantization,
            "prompt_tokens": [SHORTEST, longest],
            "threads": torch.get_num_threads(),
        }
        return {
            "benchmark": "serving",
            "environment": environment(model.device),
            "conditions": conditions,
            "throughput": found | {name: {"failed": why} for name, why in absent.items() if why},
            "arrivals": runs,
        }


def report(record: Record) -> str:
    """The tables of a record: conditions, throughput of ours and the peers, percentiles of both latencies."""
    said = record["conditions"]
    weights = f", weights in {said['quantization']}" if said["quantization"] else ""
    if said["kv_cache_dtype"] != "auto":
        weights += f", keys and values in {said['kv_cache_dtype']}"
    weights += ", deterministic" if said["deterministic"] else ""
    drafts = (
        f", {counted(said['num_draft_tokens'], 'draft token', 'draft tokens')} by {said['speculation']}"
        if said["speculation"]
        else ""
    )
    shortest, longest = said["prompt_tokens"]
    heading = (
        f"{said['model']}, {said['dtype']}{weights} on {record['environment']['device']}{drafts}: "
        f"prompts of {shortest} to {longest} tokens, {said['tokens']} new ones each"
    )
    parts = [
        heading,
        f"{counted(said['requests'], 'request')} at once, {_rounds(said['rounds'])}\n{_throughput(record)}",
    ]
    if record["arrivals"]:
        parts.append(
            f"{counted(said['arrivals'], 'request')} at random, by load; milliseconds\n{_latency(record['arrivals'])}"
        )
    return "\n\n".join(parts)


def _rounds(count: int) -> str:
    return "1 round" if count == 1 else f"medians of {count} rounds"


def _throughput(record: Record) -> str:
    tokens, own = record["conditions"]["tokens"], record["throughput"][OURS]["requests_per_second"]
    compared = any("failed" not in figures for name, figures in record["throughput"].items() if name != OURS)
    rows: list[tuple[str, ...]] = [("", "requests/s", "tokens/s", *(("ours is", "answers differ") if compared else ()))]
    failed = []
    for name, figures in record["throughput"].items():
        if "failed" in figures:
            failed.append(f"{name}: {figures['failed']}")
            continue
        rate = figures["requests_per_second"]
        ratio = "" if name == OURS else f"{own / rate:.2f} times"
        beside = (ratio, str(figures["different"])) if compared else ()
        rows.append((name, f"{rate:.2f}", f"{tokens * rate:.1f}", *beside))
    return "\n".join([table(rows), *failed])


def _latency(runs: Sequence[Record]) -> str:
    names = [f"p{percent}" for percent in PERCENTILES]
    rows = [("load", "requests/s", "to the first token:", *names, "to the next:", *names)]
    for run in runs:
        cells = [f"{run['load']:.0%}", f"{run['rate']:.2f}"]
        for each in ("first", "inter"):
            seconds = run[f"{each}_token_seconds"]
            cells += [counted(len(seconds), "sample"), *milliseconds(seconds)]
        rows.append(tuple(cells))
    return table(rows)
