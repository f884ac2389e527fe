"""Cost of FlashInfer's `plan` on this project's ops: it builds a dense page table from indices and bounds in each step.

python -m benchmarks.plan_cost [--sequences 256] [--tokens 100000] [--page-sizes 1 16] [--rounds 5] [--output FILE]

`BatchDecodeWithPagedKVCacheWrapper.plan` on the CPU, for sequences of one length with pages scattered over a pool; a
serving stack calls it once per step. The first plan, which allocates the table, is not counted. It takes turns with a
copy of the indices, a lower bound for building the table. Peak memory is what a plan allocates beyond what it keeps,
measured in a separate round. Linux only: /proc/self/status.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from benchmarks.weights_memory import MB, Peak
from fastllama.bench.environment import environment
from fastllama.bench.files import output_file, write_record
from fastllama.integrations.flashinfer import BatchDecodeWithPagedKVCacheWrapper

SIZES = (32, 8, 128)  # query heads, KV heads and head size of an 8B model; a plan's cost does not depend on them


def measure(sequences: int, tokens: int, page_size: int, rounds: int) -> dict[str, Any]:
    """Returns the seconds of each plan and copy, the bytes kept, and a plan's peak allocation beyond them."""
    pages = -(-tokens // page_size)
    bounds = torch.arange(sequences + 1, dtype=torch.int32, device="cpu") * pages
    indices = torch.randperm(sequences * pages, dtype=torch.int32, device="cpu")
    last = torch.full((sequences,), tokens - (pages - 1) * page_size, dtype=torch.int32, device="cpu")
    wrapper = BatchDecodeWithPagedKVCacheWrapper(torch.empty(0, dtype=torch.uint8, device="cpu"))

    def plan() -> None:
        wrapper.plan(bounds, indices, last, *SIZES, page_size)

    plan()
    copied = torch.empty_like(indices)
    seconds: dict[str, list[float]] = {"plan": [], "copy": []}
    for _ in range(rounds):
        for name, run in (("plan", plan), ("copy", lambda: copied.copy_(indices))):
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    peak = Peak()
    plan()
    anonymous, _ = peak.end()
    table = wrapper._page_table
    assert table is not None
    return {"page_size": page_size, "seconds": seconds, "table_bytes": table.nbytes, "peak_bytes": anonymous}


def main() -> None:
    """Measure, print a line for each page size, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=100_000, help="of each (default: %(default)s)")
    parser.add_argument("--page-sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=output_file, help="where to write conditions and every round as JSON")
    options = parser.parse_args()
    samples = []
    for page_size in options.page_sizes:
        found = measure(options.sequences, options.tokens, page_size, options.rounds)
        samples.append(found)
        plan, copy = (statistics.median(found["seconds"][name]) for name in ("plan", "copy"))
        print(
            f"pages of {page_size}: a plan {1e3 * plan:.1f} ms, a copy of the indices {1e3 * copy:.1f} ms; "
            f"a table of {found['table_bytes'] / MB:.1f} MB, beside it at most {found['peak_bytes'] / MB:.1f}",
            flush=True,
        )
    if options.output:
        conditions = {key: str(value) for key, value in vars(options).items() if key != "output"}
        conditions["threads"] = str(torch.get_num_threads())
        record = {"benchmark": "plan_cost", "environment": environment(), "conditions": conditions}
        write_record(options.output, record | {"samples": samples})


if __name__ == "__main__":
    main()
