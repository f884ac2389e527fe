"""Every op at Llama 2's shapes compared with its peers: checked, then timed. Cases without time left are named."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from benchmarks.gpu import results, stage
from benchmarks.ops.libraries import peers
from fastllama.bench.environment import gpu
from fastllama.bench.ops import comparison
from fastllama.bench.ops.report import ALONE, OURS
from fastllama.catalogue.llama_calls import MEASURED, LlamaCall, llama_calls, toy_calls

FIRST = ("matmul", "matmul_int4", "attention_decode", "attention_prefill")  # what decode and prefill wait for


def plan(dtype: torch.dtype, dry: bool, device: torch.device) -> Iterator[LlamaCall]:
    """The cases in order: FIRST, then other ops with a kernel for the device, then the rest; within, as registered."""
    order = (*FIRST, *(op for op in MEASURED if op not in FIRST))
    found = list(toy_calls(dtype, order) if dry else llama_calls(dtype, order))
    for kernel in (True, False):
        yield from (
            case for case in found if (comparison.implementation(case.op, device).backend != "reference") == kernel
        )


def main() -> int:
    """Add a line for each case; returns 1 if one of this project's ops failed."""
    options = stage.options(__doc__, dtype="bfloat16", seconds=1e9)
    device, start, longest, failed = stage.device(options.dry), time.monotonic(), 0.0, False
    for case in plan(getattr(torch, options.dtype), options.dry, device):
        began = time.monotonic()
        if began + longest - start > options.seconds:
            results.append(options.results, stage="ops", skipped=f"{case.op}, {case.label}: no time left")
            continue
        try:
            with comparison.interpreted(options.dry):
                found = comparison.measure(
                    case, device, peers(case.op, device), rounds=2 if options.dry else comparison.ROUNDS
                )
        except (MemoryError, torch.OutOfMemoryError):
            results.append(options.results, stage="ops", skipped=f"{case.op}, {case.label}: does not fit in memory")
            continue
        finally:
            if not options.dry:
                torch.cuda.empty_cache()  # the memory of this case's graphs
        seconds = time.monotonic() - began
        longest = max(longest, seconds)
        results.append(options.results, stage="ops", case=found, gpu=gpu(), seconds=round(seconds, 1))
        print(f"{case.op}, {case.label}: {seconds:.1f} s", flush=True)
        own = (each for name, each in found["contenders"].items() if name in (OURS, ALONE))
        failed = failed or any("failed" in each for each in own)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
