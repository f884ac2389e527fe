"""Cost of scoring multiple-choice questions: prompt tokens computed, steps, seconds.

python -m benchmarks.choices [--model tiny] [--questions 100] [--context 500] [--page-size 64] [--output FILE]

Four choices of 5 to 20 tokens for each question, all submitted at once, of random ids: the work does not depend on the
text. Each question has its own context, or all share its first half, like a few-shot prompt. "prompt_logprobs" does
without LLM.score: each choice generates a token, and the logits of its whole prompt are computed. The least is what a
cache with pages of one token would compute: each context once, and each choice.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from typing import Any

from fastllama import LLM, SamplingParams
from fastllama.bench.environment import environment
from fastllama.bench.files import output_file, write_record
from fastllama.bench.text import table
from fastllama.errors import check_range
from fastllama.runtime.outputs import RequestMetrics

CHOICES = 4
LENGTHS = (5, 20)  # tokens of a choice


def questions(
    vocab_size: int, count: int, context: int, *, shared: int = 0, seed: int = 0
) -> list[tuple[list[int], list[list[int]]]]:
    """Returns the questions: a context, whose first `shared` tokens all have in common, and its choices."""
    rng = random.Random(seed)

    def ids(length: int) -> list[int]:
        return [rng.randrange(3, vocab_size) for _ in range(length)]

    examples = ids(shared)
    return [
        (examples + ids(context - shared), [ids(rng.randint(*LENGTHS)) for _ in range(CHOICES)]) for _ in range(count)
    ]


def least(asked: list[tuple[list[int], list[list[int]]]], shared: int) -> int:
    """Counts distinct prefixes: tokens to compute with perfect sharing. A prompt's last token is not fed."""
    own = sum(len(context) - shared + sum(len(choice) - 1 for choice in choices) for context, choices in asked)
    return shared + own


def by_prompt_logprobs(llm: LLM, prompts: list[list[int]], starts: list[int]) -> list[RequestMetrics]:
    """Score prompts by the log-probabilities of all their tokens."""
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    return [output.metrics for output in llm.generate(prompts, params)]


def by_score(llm: LLM, prompts: list[list[int]], starts: list[int]) -> list[RequestMetrics]:
    """Score only the choices, with LLM.score."""
    return [output.metrics for output in llm.score(prompts, starts)]


WAYS: dict[str, Callable[[LLM, list[list[int]], list[int]], list[RequestMetrics]]] = {
    "prompt_logprobs": by_prompt_logprobs,
    "score": by_score,
}


def measure(llm: LLM, asked: list[tuple[list[int], list[list[int]]]], way: str) -> dict[str, Any]:
    """Score all choices, starting with an empty prefix cache."""
    llm.reset_prefix_cache()
    prompts = [context + choice for context, choices in asked for choice in choices]
    starts = [len(context) for context, choices in asked for _ in choices]
    start = time.perf_counter()
    found = WAYS[way](llm, prompts, starts)
    seconds = time.perf_counter() - start
    computed = sum(metrics.num_prompt_tokens - metrics.num_cached_tokens for metrics in found)
    return {"way": way, "tokens": computed, "seconds": seconds}


def main() -> None:
    """Measure each method and print a line for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="as LLM takes it")
    parser.add_argument("--questions", type=int, default=100, help="how many")
    parser.add_argument("--context", type=int, default=500, help="tokens of each")
    parser.add_argument("--page-size", type=int, default=64, help="tokens of a KV page")
    parser.add_argument("--output", type=output_file, help="where to write conditions and figures as JSON")
    options = parser.parse_args()
    check_range("--questions", options.questions, 1)
    check_range("--context", options.context, 2)
    cases: list[dict[str, Any]] = []
    with LLM(options.model, page_size=options.page_size, progress=False) as llm:
        for name, shared in (("own contexts", 0), ("half shared", options.context // 2)):
            asked = questions(llm.config.vocab_size, options.questions, options.context, shared=shared)
            floor = least(asked, shared)
            cases += [{"questions": name, "least": floor, **measure(llm, asked, way)} for way in WAYS]
    rows = [("questions", "way", "tokens computed", "of the first", "least", "seconds")]
    for case in cases:
        first = next(each for each in cases if each["questions"] == case["questions"])
        share = f"{case['tokens'] / first['tokens']:.1%}"
        cells = (f"{case['tokens']:,}", share, f"{case['least'] / first['tokens']:.1%}", f"{case['seconds']:.2f}")
        rows.append((case["questions"], case["way"], *cells))
    print(table(rows))
    if options.output:
        conditions = {key: str(value) for key, value in vars(options).items() if key != "output"}
        write_record(
            options.output,
            {"benchmark": "choices", "environment": environment(), "conditions": conditions, "cases": cases},
        )


if __name__ == "__main__":
    main()
