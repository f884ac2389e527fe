"""Overhead of the prefix cache for prompts without a common prefix: lookups and publishing pages.

python -m benchmarks.prefix_cost [--model tiny] [--requests 64] [--tokens 64] [--rounds 3] [--output FILE]

Prompts of 8 to 400 random tokens, all submitted at the start, each answered with `--tokens` tokens, by a model and by
one that computes nothing (benchmarks/null_model.py), whose time is the host's work alone. Timed are the scheduler's
lookups and publications, including the hashing of tokens to keys and the clock itself. One warm-up round is not
counted.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.null_model import null_model
from fastllama import LLM, SamplingParams
from fastllama.bench.environment import environment
from fastllama.bench.files import output_file, write_record
from fastllama.bench.workload import LONGEST, prompts_of
from fastllama.runtime.planning.lookups import Lookups
from fastllama.runtime.planning.scheduler import Scheduler

VOCAB = 256  # of the model that computes nothing: small, so that sampling is negligible too
TIMED = ((Lookups, "find"), (Scheduler, "_publish_next"))


@dataclass
class Round:
    """Seconds of all steps of a round, and the part spent in the prefix cache."""

    seconds: float
    steps: int
    lookups: int
    lookup_seconds: float
    publications: int
    publication_seconds: float
    hit_tokens: int

    @property
    def share(self) -> float:
        """The part of the steps' time."""
        return (self.lookup_seconds + self.publication_seconds) / self.seconds


@contextmanager
def timed() -> Iterator[list[list[float]]]:
    """Context in which each call of a function in TIMED appends its seconds to that function's list."""
    found: list[list[float]] = [[] for _ in TIMED]
    before = [getattr(owner, name) for owner, name in TIMED]

    def timing(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            start = time.perf_counter()
            result = function(*args)
            seconds.append(time.perf_counter() - start)
            return result

        return run

    for (owner, name), function, seconds in zip(TIMED, before, found, strict=True):
        setattr(owner, name, timing(function, seconds))
    try:
        yield found
    finally:
        for (owner, name), function in zip(TIMED, before, strict=True):
            setattr(owner, name, function)


def measure(llm: LLM, prompts: list[list[int]], tokens: int) -> Round:
    """Answer all prompts; returns one round."""
    engine, steps, start_hits = llm.engine, 0, llm.engine.pool.num_hit_tokens
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    for prompt in prompts:
        engine.add_request(prompt, params)
    with timed() as (lookups, publications):
        start = time.perf_counter()
        while engine.has_work:
            engine.step()
            steps += 1
        seconds = time.perf_counter() - start
    return Round(
        seconds=seconds,
        steps=steps,
        lookups=len(lookups),
        lookup_seconds=sum(lookups),
        publications=len(publications),
        publication_seconds=sum(publications),
        hit_tokens=engine.pool.num_hit_tokens - start_hits,
    )


def rounds_of(llm: LLM, requests: int, tokens: int, rounds: int) -> list[Round]:
    """Rounds with new prompts each, after a warm-up round. Asserts that no token was found in the cache."""
    generator, found = random.Random(0), []
    for _ in range(1 + rounds):
        found.append(measure(llm, prompts_of(requests, llm.config.vocab_size, LONGEST, generator), tokens))
    assert not any(each.hit_tokens for each in found), "prompts had a prefix in common"
    return found[1:]


def main() -> None:
    """Measure, print a line for each model, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=output_file, help="where to write conditions and every round as JSON")
    options = parser.parse_args()
    samples = []
    for name in (options.model, "nothing computed"):
        given = options.model if name == options.model else null_model(VOCAB, options.requests)
        with LLM(given, max_model_len=400 + options.tokens, max_num_seqs=options.requests, progress=False) as llm:
            found = rounds_of(llm, options.requests, options.tokens, options.rounds)
        samples.append({"model": name, "rounds": [asdict(each) | {"share": each.share} for each in found]})
        share, step, lookup, publication = (
            statistics.median(values)
            for values in (
                [each.share for each in found],
                [each.seconds / each.steps for each in found],
                [each.lookup_seconds / each.lookups for each in found],
                [each.publication_seconds / each.publications for each in found],
            )
        )
        print(
            f"{name}: {share:.2%} of the time; a step {1e3 * step:.2f} ms, a request's lookup {1e6 * lookup:.1f} us, "
            f"a page's publication {1e6 * publication:.1f} us",
            flush=True,
        )
    if options.output:
        conditions = {key: str(value) for key, value in vars(options).items() if key != "output"}
        conditions["threads"] = str(torch.get_num_threads())
        record = {"benchmark": "prefix_cost", "environment": environment(), "conditions": conditions}
        write_record(options.output, record | {"samples": samples})


if __name__ == "__main__":
    main()
