"""kernels.matmul on this CPU beside torch's linear layer: milliseconds and the rate at which the weight is read.

python -m benchmarks.cpu_matmul [--dtype bfloat16] [--output FILE]

The shapes are the gate and up projection of TinyLlama-1.1B and Llama-2-7B. Calls go through enough copies of the weight
that none is found in the cache. The medians of alternating calls are printed.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks import timing
from benchmarks.environment import environment, write_record
from fastllama import kernels

SHAPES = ((11264, 2048), (22016, 4096))  # [N, K]
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
BYTES = 300_000_000  # of weights gone through: ten times a large shared cache
CALLS = 9


@torch.inference_mode()
def measure(rows: int, features: int, size: int, dtype: torch.dtype) -> dict[str, list[float]]:
    """Seconds of each call, ours and torch's in turn."""
    copies = max(2, BYTES // (features * size * dtype.itemsize))
    weights = [torch.randn(features, size).to(dtype) for _ in range(copies)]
    x = torch.randn(rows, size).to(dtype)
    calls: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "fastllama": lambda weight: kernels.matmul(x, weight),
        "F.linear": lambda weight: F.linear(x, weight),
    }
    next_weight = itertools.cycle(weights).__next__
    samplers = {name: timing.wall(lambda call=call: call(next_weight())) for name, call in calls.items()}
    return timing.in_turns(samplers, CALLS)


def main() -> None:
    """Measure every shape and number of rows, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--output", type=Path, help="where to write conditions and raw samples as JSON")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    records = []
    print(f"{'N':>6} {'K':>5} {'rows':>5} {'ours ms':>8} {'GB/s':>6} {'torch ms':>9} {'GB/s':>6} {'ratio':>6}")
    for features, size in SHAPES:
        weight_bytes = features * size * dtype.itemsize
        for rows in ROWS:
            samples = measure(rows, features, size, dtype)
            ours, theirs = (statistics.median(samples[name]) for name in ("fastllama", "F.linear"))
            print(
                f"{features:6} {size:5} {rows:5} {ours * 1e3:8.2f} {weight_bytes / ours / 1e9:6.1f} "
                f"{theirs * 1e3:9.2f} {weight_bytes / theirs / 1e9:6.1f} {theirs / ours:6.2f}"
            )
            records.append({"rows": rows, "features": features, "size": size, "seconds": samples})
    if options.output:
        found = {"benchmark": "cpu_matmul", "dtype": options.dtype, "environment": environment(), "samples": records}
        write_record(options.output, found)


if __name__ == "__main__":
    main()
