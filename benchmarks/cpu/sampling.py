"""kernels.sample on this CPU compared with the reference, which sorts: milliseconds per batch.

python -m benchmarks.cpu.sampling [--rows 64] [--vocab 32000] [--output FILE]

Logits are normal with a standard deviation of 3: a few thousand tokens hold 90 % of the probability, far more than in a
trained model. The medians of alternating calls are printed.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from torch import Tensor

from fastllama import kernels
from fastllama.bench import timing
from fastllama.bench.environment import environment
from fastllama.bench.files import output_file, write_record
from fastllama.kernels.dispatch.op import OPS

# temperature, top_k, top_p, min_p
FILTERS = {
    "greedy": (0.0, 0, 1.0, 0.0),
    "temperature": (0.8, 0, 1.0, 0.0),
    "top-k 50": (0.8, 50, 1.0, 0.0),
    "top-p 0.9": (0.8, 0, 0.9, 0.0),
    "min-p 0.05": (0.8, 0, 1.0, 0.05),
    "all": (0.8, 50, 0.9, 0.05),
}
CALLS = 5


def sampled(backend: str, logits: Tensor, parameters: tuple[Tensor, ...]) -> None:
    """One call of the public function on one backend."""
    (run,) = (each.run for each in OPS["sample"].implementations("cpu") if each.backend == backend)
    with OPS["sample"].bound_to(logits.device, run):
        kernels.sample(logits, *parameters)


@torch.inference_mode()
def measure(rows: int, vocab: int, filters: tuple[float, int, float, float]) -> dict[str, list[float]]:
    """Seconds of each call, by backend, in turn."""
    logits = 3 * torch.randn(rows, vocab)
    temperature, top_k, top_p, min_p = (torch.full((rows,), value) for value in filters)
    parameters = (temperature, top_k, top_p, min_p, torch.zeros(rows, dtype=torch.int64), torch.arange(rows))
    backends = [each.backend for each in OPS["sample"].implementations("cpu")]
    samplers = {name: timing.wall(lambda name=name: sampled(name, logits, parameters)) for name in backends}
    return timing.in_turns(samplers, CALLS)


def main() -> None:
    """Measure every combination of filters, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--output", type=output_file, help="where to write conditions and raw samples as JSON")
    options = parser.parse_args()
    records = []
    for name, filters in FILTERS.items():
        samples = measure(options.rows, options.vocab, filters)
        medians = {backend: statistics.median(seconds) for backend, seconds in samples.items()}
        print(f"{name:12}", *(f"{backend} {seconds * 1e3:9.2f} ms" for backend, seconds in medians.items()))
        records.append({"filters": name, "rows": options.rows, "vocab": options.vocab, "seconds": samples})
    if options.output:
        found = {"benchmark": "cpu_sampling", "environment": environment(), "samples": records}
        write_record(options.output, found)


if __name__ == "__main__":
    main()
