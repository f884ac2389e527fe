"""Measures throughput: requests per second, with all prompts submitted at the start."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from fastllama.bench.workload import Prompts
from fastllama.runtime.llm import LLM
from fastllama.runtime.params import SamplingParams

OURS = "fastllama"
Contender = Callable[[Prompts, int], Prompts]


def ours(llm: LLM, prompts: Prompts, tokens: int) -> Prompts:
    """The runtime's greedy answers."""
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params)]


def throughput(
    contenders: dict[str, Contender], prompts: Prompts, tokens: int, rounds: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """For each contender, every round's seconds, requests per second, and the number of answers unlike the first's.

    They take turns, after an uncounted warm-up round. A contender's exception is in "failed"; the first contender,
    ours, must not raise.
    """
    found: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in contenders}
    expected: Prompts = []
    for number in range(1 + rounds):
        say(f"throughput: round {number} of {rounds}" if number else "throughput: warm-up")
        for name, answer in contenders.items():
            if "failed" in found[name]:
                continue
            start = time.perf_counter()
            try:
                answers = answer(prompts, tokens)
            except Exception as failure:
                if not expected:
                    raise
                found[name] = {"failed": f"{type(failure).__name__}: {failure}"[:500]}
                continue
            seconds = time.perf_counter() - start
            expected = expected or answers
            if number:
                found[name]["seconds"].append(seconds)
            found[name]["different"] = sum(a != b for a, b in zip(answers, expected, strict=True))
    for figures in found.values():
        if "failed" not in figures:
            figures["requests_per_second"] = len(prompts) / statistics.median(figures["seconds"])
    return found
