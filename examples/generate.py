"""Sample several continuations of several prompts in one batch, each with its least likely token.

python examples/generate.py [MODEL] [--device cuda] [--quantization int4] [--tokens 32]

MODEL is a Hugging Face id or folder, a Meta folder, or a file of llama2.c; without one, the bundled model.
"""

from __future__ import annotations

import argparse
import math
import textwrap
import time

from fastllama import LLM, RequestOutput, SamplingParams

PROMPTS = ["Once upon a time", "The old baker had a secret.", "One day, a fox"]
SAMPLES = 2


def show(result: RequestOutput) -> None:
    """Print a prompt and its samples, and where each sample was least certain."""
    print(f"\n{result.prompt!r}, seed {result.seed}")
    for sample in result.outputs:
        print(textwrap.fill(sample.text.strip(), 100, initial_indent="  ", subsequent_indent="  "))
        assert sample.logprobs is not None  # SamplingParams asks for them
        token = min(sample.logprobs, key=lambda token: token.logprob)
        chance, best = math.exp(token.logprob), math.exp(token.top[0][1])
        print(f"    least likely: {token.text!r}, {chance:.0%}, rank {token.rank} (rank 1 had {best:.0%})")


def main() -> None:
    """Generate and print; `deterministic` makes each sample independent of the rest of its batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quantization", default="auto")
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    params = [
        SamplingParams(n=SAMPLES, temperature=0.8, top_p=0.95, seed=seed, max_tokens=options.tokens, logprobs=1)
        for seed in range(len(PROMPTS))
    ]
    with LLM(options.model, device=options.device, quantization=options.quantization, deterministic=True) as llm:
        start = time.perf_counter()
        results = llm.generate(PROMPTS, params)
        seconds = time.perf_counter() - start
    for result in results:
        show(result)
    tokens = sum(result.metrics.num_generated_tokens for result in results)
    print(f"\n{len(PROMPTS) * SAMPLES} samples in one batch: {tokens} tokens, {tokens / seconds:.0f} tokens/s")


if __name__ == "__main__":
    main()
