"""Host overhead of launching a Triton kernel through the public op: `python -m benchmarks.launch_overhead`.

The goal is 15 us in eager mode. The whole call is timed: checks, dispatch, launch configuration, Triton, driver. On a
CPU the driver is left out: Triton compiles for an H100 and calls a launcher that does nothing.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from triton.runtime import driver

from fastllama import kernels
from fastllama.bench import timing
from fastllama.bench.environment import environment
from fastllama.bench.files import output_file, write_record
from fastllama.catalogue.arguments import as_written, inputs
from fastllama.catalogue.llama_calls import MEASURED, LlamaCall, toy_calls
from fastllama.kernels.dispatch.op import OPS
from fastllama.kernels.triton.sampling.draw import workspace_size
from fastllama.testing.drivers import DryDriver
from fastllama.testing.targets import target

CALLS = 50  # in a row: fewer than fit into a GPU's launch queue, where the host would wait


def triton_ops() -> list[str]:
    """The ops that have a Triton kernel."""
    return [op for op in MEASURED if OPS[op].has_triton]


def _emptied(call: timing.Call, device: torch.device) -> timing.Sampler:
    """Returns the wall-clock time of CALLS calls; then synchronizes, so that no call waits for a full launch queue."""
    timed = timing.wall(call, CALLS)

    def sample() -> float:
        seconds = timed()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return seconds

    return sample


@torch.inference_mode()
def measure(case: LlamaCall, device: torch.device, rounds: int) -> dict[str, Any]:
    """Returns microseconds per call, with outputs passed in and with outputs allocated."""
    call = case.make(device, seed=0)
    if case.op == "sample":  # on a CPU its public function allocates none
        call["workspace"] = torch.empty(workspace_size(call["logits"]), dtype=torch.int64, device=device)
    args, named = as_written(case.op, call)
    fewer = inputs(case.op, named)
    public = getattr(kernels, case.op)
    calls = {"outputs given": lambda: public(*args, **named), "allocated": lambda: public(*args, **fewer)}
    with OPS[case.op].bound_to(device, OPS[case.op].launcher("cuda")):
        taken = timing.in_turns({name: _emptied(call, device) for name, call in calls.items()}, rounds)
    microseconds = {name: [1e6 * seconds for seconds in samples] for name, samples in taken.items()}
    return {name: {"us": samples, **timing.quantiles(samples)} for name, samples in microseconds.items()}


def main() -> None:
    """Measure every op, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--output", type=output_file, help="where to write conditions and raw samples as JSON")
    options = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu":
        driver.set_active(DryDriver(target("sm_90"), lambda *launch: None))
    dtype = torch.bfloat16
    torch.set_num_threads(1)
    plan = [case for case in toy_calls(dtype, tuple(triton_ops())) if case.pages_dtype is None]
    found = {case.op: measure(case, device, options.rounds) for case in plan}
    what = "whole launches" if device.type == "cuda" else "without the driver"
    x = torch.randn(1, 16)
    add = (
        1e6 * timing.quantiles([timing.wall(lambda: torch.add(x, x), CALLS)() for _ in range(options.rounds)])["median"]
    )
    print(
        f"three rows, {dtype}, {device.type}, {what}; medians of {options.rounds} rounds of {CALLS} calls; "
        f"torch.add on the CPU: {add:.2f} us"
    )
    print(f"{'op':20} {'outputs given us':>17} {'allocated us':>13}")
    for op, figures in found.items():
        print(f"{op:20} {figures['outputs given']['median']:17.2f} {figures['allocated']['median']:13.2f}")
    if options.output:
        record = {
            "benchmark": "launch_overhead",
            "environment": environment(),
            "device": device.type,
            "torch_add_us": add,
            "ops": found,
        }
        write_record(options.output, record)


if __name__ == "__main__":
    main()
