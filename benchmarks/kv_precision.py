"""What keys and values in 8 bits cost in perplexity.

python -m benchmarks.kv_precision [--model tiny] [--dtype float32] [--text FILE] [--output FILE]

Each line of the text is a document of its own, and each of its tokens but the first is judged from the pages that the
tokens before it left. Without --text: stories that the bundled model has not seen.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

from fastllama import LLM, SamplingParams
from fastllama.bench.environment import environment
from fastllama.bench.files import output_file, write_record
from fastllama.runtime.options import KV_DTYPES
from tools.tiny_model.evaluate import held_out_text
from tools.tiny_model.stories import story


def losses(llm: LLM, lines: list[str]) -> list[float]:
    """Negative log-likelihood, in nats, of each token but the first of each line."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    return [
        -each.logprob
        for output in llm.generate(lines, params)
        for each in output.prompt_logprobs or ()
        if each is not None
    ]


def main() -> None:
    """Measure each kind of page and print a line for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="as LLM takes it")
    parser.add_argument("--dtype", default="float32", help="of the model: in 16 bits its own rounding is in the way")
    parser.add_argument("--text", type=Path, help="a file in UTF-8, a document a line")
    parser.add_argument("--output", type=output_file, help="where to write conditions and figures as JSON")
    options = parser.parse_args()
    lines = options.text.read_text(encoding="utf-8").splitlines() if options.text else held_out_text(story)
    cases: list[dict[str, Any]] = []
    for kind in KV_DTYPES:
        start = time.perf_counter()
        with LLM(options.model, dtype=options.dtype, quantization=None, kv_cache_dtype=kind) as llm:
            found = losses(llm, lines)
        perplexity = math.exp(sum(found) / len(found))
        cases.append({"kv_cache_dtype": kind, "tokens": len(found), "perplexity": perplexity})
        more, took = perplexity / cases[0]["perplexity"] - 1, time.perf_counter() - start
        print(f"{kind:5} {len(found)} tokens, perplexity {perplexity:.5f} ({more:+.3%}), {took:.0f} s")
    if options.output:
        conditions = {key: str(value) for key, value in vars(options).items() if key != "output"}
        write_record(
            options.output,
            {"benchmark": "kv_precision", "environment": environment(), "conditions": conditions, "cases": cases},
        )


if __name__ == "__main__":
    main()
