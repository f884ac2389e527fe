"""Matmuls on this CPU compared with torch's linear layer: milliseconds, and the read rate of a 16-bit weight.

python -m benchmarks.cpu.matmul [--dtype bfloat16] [--output FILE]

The shapes are the gate and up projection of TinyLlama-1.1B and Llama-2-7B. Calls cycle through enough copies of the
weight to miss the cache. The medians of alternating calls are printed.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F

from fastllama import kernels
from fastllama.bench import timing
from fastllama.bench.environment import environment
from fastllama.bench.files import output_file, write_record
from fastllama.catalogue.sizes import LlamaSizes

SHAPES = [LlamaSizes.of(name).gate_up for name in ("tinyllama-1.1b", "llama-2-7b")]  # [N, K]
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
BYTES = 300_000_000  # bytes of weights per cycle: ten times a large shared cache
CALLS = 9


@torch.inference_mode()
def measure(rows: int, features: int, size: int, dtype: torch.dtype) -> dict[str, list[float]]:
    """Returns the seconds of each call, by this project (bf16 weights also packed into 12 bits) and torch, in turn."""
    copies = max(2, BYTES // (features * size * dtype.itemsize))
    weights = [torch.randn(features, size).to(dtype) for _ in range(copies)]
    x = torch.randn(rows, size).to(dtype)
    next_weight = itertools.cycle(weights).__next__
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "fastllama": lambda: kernels.matmul(x, next_weight()),
        "F.linear": lambda: F.linear(x, next_weight()),
    }
    if dtype == torch.bfloat16:
        next_packed = itertools.cycle([kernels.pack_bf12(weight) for weight in weights]).__next__
        calls["fastllama bf12"] = lambda: kernels.matmul_bf12(x, *next_packed())
    return timing.in_turns({name: timing.wall(call) for name, call in calls.items()}, CALLS)


def main() -> None:
    """Measure every shape and number of rows, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--output", type=output_file, help="where to write conditions and raw samples as JSON")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    records = []
    print(f"{'N':>6} {'K':>5} {'rows':>5} {'':15} {'ms':>8} {'GB/s':>6} {'ratio':>6}")
    for features, size in SHAPES:
        for rows in ROWS:
            samples = measure(rows, features, size, dtype)
            medians = {name: statistics.median(taken) for name, taken in samples.items()}
            for name, seconds in medians.items():
                rate = features * size * dtype.itemsize / seconds / 1e9
                print(
                    f"{features:6} {size:5} {rows:5} {name:15} {seconds * 1e3:8.2f} {rate:6.1f} "
                    f"{medians['F.linear'] / seconds:6.2f}"
                )
            records.append({"rows": rows, "features": features, "size": size, "seconds": samples})
    if options.output:
        found = {"benchmark": "cpu_matmul", "dtype": options.dtype, "environment": environment(), "samples": records}
        write_record(options.output, found)


if __name__ == "__main__":
    main()
