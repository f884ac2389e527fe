"""Decoding on a busy CPU, for each number of threads, compared with llama.cpp in the same run.

python -m benchmarks.cpu.busy [--model tiny] [--neighbours 0 1 2] [--rounds 3] [--tokens 24] [--output FILE]

It starts the neighbours itself: processes that compute without a pause. Two questions: how much threads lose on a busy
machine, relative to one thread in the same conditions, and whether they still gain what they do on an idle one. This
project, in each format, and llama.cpp, where the extra [llama] is installed, hold the same random weights and take
turns. Times are of whole answers: the prompt, and each generated token.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch

from benchmarks.cpu import llama_cpp
from benchmarks.cpu.decode import build, load_llama_cpp, time_llama_cpp, time_ours
from fastllama.bench.environment import environment
from fastllama.bench.files import output_file, write_record
from fastllama.bench.models import shape
from fastllama.bench.timing import Generation

Run = Callable[[list[int]], Generation]
SETTLE = 0.5  # seconds for neighbours to start, and for threads to notice
NEIGHBOUR = """
import os
parent = os.getppid()
while os.getppid() == parent:  # where this process is killed, they end too
    for _ in range(1_000_000):
        pass
"""


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Context in which that many other processes compute without a pause."""
    with ExitStack() as stack:
        for _ in range(count):
            process = subprocess.Popen([sys.executable, "-c", NEIGHBOUR])
            stack.callback(process.wait)
            stack.callback(process.kill)
        time.sleep(SETTLE)
        yield


def measure(runs: dict[str, Run], options: argparse.Namespace) -> list[dict[str, object]]:
    """Returns a sample for each number of neighbours, round, contender and number of threads."""
    generator, most = torch.Generator().manual_seed(0), torch.get_num_threads()
    samples: list[dict[str, object]] = []
    for count in options.neighbours:
        with neighbours(count):
            for number in range(options.rounds + 1):
                for name, run in runs.items():
                    for threads in dict.fromkeys((1, most)):
                        torch.set_num_threads(threads)
                        # A new prompt each time: no prefix cache hits.
                        taken = run(torch.randint(3, 2000, (options.prompt_tokens,), generator=generator).tolist())
                        if number:  # the first is the warm-up
                            samples.append({"neighbours": count, "contender": name, "threads": threads, **taken})
    torch.set_num_threads(most)
    return samples


def print_table(samples: list[dict[str, object]], prompt_tokens: int, tokens: int) -> None:
    """Print median rates of each contender: with one thread, with all, and the ratio of their times."""
    taken: dict[tuple[object, object], dict[object, list[dict[str, object]]]] = {}
    for each in samples:
        taken.setdefault((each["neighbours"], each["contender"]), {}).setdefault(each["threads"], []).append(each)
    print("| neighbours | | threads | decode tok/s | prefill tok/s | decode, times one thread | prefill |")
    print("|---|---|---|---|---|---|---|")
    for (count, name), by_threads in taken.items():
        alone: list[float] = []
        for threads, some in by_threads.items():
            rates = [
                statistics.median(number / float(each[part]) for each in some)  # type: ignore[arg-type]
                for part, number in (("decode", tokens - 1), ("prefill", prompt_tokens))
            ]
            alone = alone or rates
            gains = " | ".join(f"{rate / base:.2f}" for rate, base in zip(rates, alone, strict=True))
            print(f"| {count} | {name} | {threads} | {rates[0]:.2f} | {rates[1]:.1f} | {gains} |")


def main() -> None:
    """Take the measurements, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tiny", "1.1b"), default="1.1b", help="model whose shape is used")
    parser.add_argument("--neighbours", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--output", type=output_file, help="where to write conditions and raw samples as JSON")
    options = parser.parse_args()
    llms, theirs = build(torch.bfloat16, shape(options.model, 1024).to_hf())
    runs: dict[str, Run] = {
        name: lambda prompt, llm=llm: time_ours(llm, prompt, options.tokens) for name, llm in llms.items()
    }
    absent = llama_cpp.missing()
    if absent:
        print(f"llama.cpp is left out: {absent}")
    else:
        for name, decoder in load_llama_cpp(theirs, options.prompt_tokens).items():
            runs[name] = lambda prompt, decoder=decoder: time_llama_cpp(decoder, prompt, options.tokens)
    samples = measure(runs, options)
    print_table(samples, options.prompt_tokens, options.tokens)
    if options.output:
        conditions = {key: value for key, value in vars(options).items() if key != "output"}
        record = {"benchmark": "cpu_busy", "conditions": conditions, "environment": environment()}
        write_record(options.output, record | {"llama_cpp": absent or llama_cpp.version(), "samples": samples})


if __name__ == "__main__":
    main()
