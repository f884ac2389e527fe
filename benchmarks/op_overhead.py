"""Overhead of a public op over the implementation it calls: `python -m benchmarks.op_overhead`.

The goal is 3 us on a machine where torch.add takes 1.1 us; the line of conditions reports torch.add on this machine.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
from collections.abc import Callable
from typing import Any

import torch

from fastllama import kernels
from fastllama.bench import timing
from fastllama.catalogue.arguments import as_written, in_order, inputs, positional
from fastllama.catalogue.maker import Arguments, Maker
from fastllama.catalogue.sizes import LlamaSizes
from fastllama.catalogue.table import CATALOGUE, Shape
from fastllama.kernels.dispatch.op import OPS

TINY = LlamaSizes("tiny", hidden=64, intermediate=8, heads=2, kv_heads=1, head_dim=16, vocab=32)


def tiny_call(op: str) -> Arguments:
    """A call with one token of the smallest Llama shape, fp32."""
    return in_order(op, CATALOGUE[op].llama(Maker(torch.float32), TINY, Shape(1, context=1)))


def microseconds(functions: list[Callable[[], Any]], rounds: int, calls: int) -> list[float]:
    """Median time of each function over rounds of `calls` calls; they take turns, so that noise affects all."""
    samplers = {str(place): timing.wall(function, calls) for place, function in enumerate(functions)}
    return [1e6 * statistics.median(samples) for samples in timing.in_turns(samplers, rounds).values()]


def overheads(op: str, rounds: int, calls: int) -> tuple[float, float, float]:
    """Microseconds: the implementation; the public call's overhead with outputs passed in, and with outputs allocated.

    The overhead is timed over an implementation that does nothing: it is smaller than a real one's noise.
    """
    call = tiny_call(op)
    (args, named), bare = as_written(op, call), positional(op, call)
    fewer = inputs(op, named)
    public, run = getattr(kernels, op), OPS[op].implementation("cpu").run
    (implementation,) = microseconds([lambda: run(*bare)], rounds, calls)

    def nothing(*args: Any) -> None:
        pass

    with OPS[op].bound_to(torch.device("cpu"), nothing):
        empty, given, allocated = microseconds(
            [lambda: nothing(*bare), lambda: public(*args, **named), lambda: public(*args, **fewer)],
            rounds,
            calls,
        )
    return implementation, given - empty, allocated - empty


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--calls", type=int, default=20, help="calls in a row in each round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    x = torch.randn(1, 16)
    with torch.inference_mode():
        (add,) = microseconds([lambda: torch.add(x, x)], options.rounds, options.calls)
        print(
            f"one token, fp32, inference mode, 1 thread; medians of {options.rounds} rounds of {options.calls} calls; "
            f"torch {torch.__version__}, Python {platform.python_version()}, load {os.getloadavg()[0]:.1f} on "
            f"{os.cpu_count()} cores; torch.add: {add:.2f} us"
        )
        print(f"{'op':20} {'backend':10} {'implementation us':>18} {'outputs given +us':>18} {'allocated +us':>14}")
        for op in OPS:
            implementation, given, allocated = overheads(op, options.rounds, options.calls)
            backend = OPS[op].implementation("cpu").backend
            print(f"{op:20} {backend:10} {implementation:18.2f} {given:18.2f} {allocated:14.2f}")


if __name__ == "__main__":
    main()
