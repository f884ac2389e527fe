"""Overhead of a decode step outside the model: scheduling, batch tensors, sampling, detokenization.

python -m benchmarks.engine_overhead [--batch 1 64] [--vocab 32 32000] [--steps 200] [--output FILE]

The model returns fixed logits at once, and its steps are replayed, as a Llama's are. With a vocabulary of 32 sampling
is negligible and the figure is the host's work; with 32000 it includes sampling, here on the CPU. One thread: at such
sizes two would wait for each other.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from benchmarks.null_model import null_model
from fastllama import LLM, SamplingParams
from fastllama.bench.environment import environment
from fastllama.bench.files import output_file, write_record

PROMPT_TOKENS = 128
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.8, "top_p": 0.95},
    "penalties, logprobs": {"temperature": 0.8, "top_p": 0.95, "frequency_penalty": 0.1, "logprobs": 5},
}


def time_steps(batch: int, vocab_size: int, kind: str, steps: int) -> list[float]:
    """Returns the seconds of each decode step with `batch` sequences."""
    length = PROMPT_TOKENS + steps + 1
    with LLM(null_model(vocab_size, batch), max_model_len=length, kv_cache_tokens=batch * (length + 64)) as llm:
        llm.engine._runner._graphs.replayable = True  # as a Llama's steps are; a replay of this model is sampling alone
        params = SamplingParams(max_tokens=steps + 1, seed=0, **KINDS[kind])
        for number in range(batch):
            llm.engine.add_request([number % vocab_size] * PROMPT_TOKENS, params)
        while llm.engine.scheduler.num_waiting:
            llm.engine.step()
        times = []
        for _ in range(steps // 2):  # the first requests have ended by then
            start = time.perf_counter()
            llm.engine.step()
            times.append(time.perf_counter() - start)
    return times


def main() -> None:
    """Take the measurements, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--vocab", type=int, nargs="+", default=[32, 32000])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=output_file, help="where to write conditions and raw samples as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    samples = []
    print(f"{'batch':>5} {'vocab':>6} {'parameters':20} {'ms/step':>8} {'p90':>8}")
    for batch in options.batch:
        for vocab_size in options.vocab:
            for kind in KINDS:
                times = time_steps(batch, vocab_size, kind, options.steps)
                median, p90 = statistics.median(times), statistics.quantiles(times, n=10)[-1]
                print(f"{batch:5} {vocab_size:6} {kind:20} {1e3 * median:8.3f} {1e3 * p90:8.3f}", flush=True)
                samples.append({"batch": batch, "vocab": vocab_size, "parameters": kind, "seconds": times})
    if options.output:
        record = {"benchmark": "engine_overhead", "environment": environment(), "samples": samples}
        write_record(options.output, record)


if __name__ == "__main__":
    main()
