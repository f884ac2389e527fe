"""Bottleneck of each kernel of a 4-bit block, by Nsight Compute's counters.

It serialises kernels, so launches do not overlap: it shows what one kernel reads and waits for, not why a step is slow.
Clocks are left unlocked.
"""

from __future__ import annotations

import shutil
import subprocess
import sys

import torch

from benchmarks.gpu import results, stage
from benchmarks.ops import block
from fastllama import LlamaConfig

KERNELS = 7  # launches of a block with split-KV attention
COUNTERS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__t_sector_hit_rate.pct",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
)
NCU = (
    *("ncu", "--clock-control", "none", "--kernel-name", "regex:matmul|decode|combine|rope"),
    *("--launch-skip", str(KERNELS), "--launch-count", str(KERNELS), "--metrics", ",".join(COUNTERS)),
)


@torch.inference_mode()
def run_block() -> None:
    """Run a block of the 7B twice: the first run compiles."""
    device = torch.device("cuda", 0)
    models = block.copies(LlamaConfig.preset("llama-2-7b"), "int4", device, 0)
    (step,) = block.steps(models, 1, 4096)
    for _ in range(2):
        block.ours(step)
    torch.cuda.synchronize()


def main() -> int:
    """Print ncu's table, or a line if ncu is not installed."""
    options = stage.options(__doc__, run=0)
    if options.run:
        run_block()
        return 0
    if options.dry or shutil.which("ncu") is None:
        results.append(options.results, stage="profile", missing="ncu" if not options.dry else "a GPU")
        return 0
    own = (sys.executable, "-m", "benchmarks.gpu.profile", "--results", str(options.results), "--run", "1")
    done = subprocess.run([*NCU, *own], check=False, capture_output=True, text=True)
    print(done.stdout + done.stderr, flush=True)
    results.append(options.results, stage="profile", ncu=done.stdout[-20000:])
    return done.returncode


if __name__ == "__main__":
    raise SystemExit(main())
