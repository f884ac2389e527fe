"""`python -m tests.kernels.fuzz`: all ops in turn for some minutes, or one case again."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import ExitStack

import torch

from fastllama import env
from fastllama.kernels.dispatch.op import OPS
from tests.kernels.fuzz.trial import ALL_CALLS, Case, backends_of, trial


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.fuzz", description=__doc__)
    parser.add_argument("--op", choices=sorted(ALL_CALLS), action="append", help="all where none is given")
    parser.add_argument("--case", type=int, help="this one alone")
    parser.add_argument("--first", type=int, default=0, help="the first case")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--small", action="store_true", help="the small cases that the interpreter runs")
    parser.add_argument("--backend", action="append", help="all that run here where none is given")
    parser.add_argument("--all", action="store_true", help="go on with an op after its first failing case")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ops = options.op or list(ALL_CALLS)
    end = time.monotonic() + 60 * options.minutes
    failed: dict[str, int] = {}
    count = 0
    with ExitStack() as stack:
        if env.triton_interpret():
            from fastllama.testing.checks import checks

            stack.enter_context(checks())
        number = options.first if options.case is None else options.case
        while time.monotonic() < end and (options.all or len(failed) < len(ops)):
            for op in ops:
                if op in failed and not options.all:
                    continue
                case = Case(op, number, options.small)
                count += 1
                for backend, fault in trial(case, options.backend or backends(op)).items():
                    failed[op] = failed.get(op, 0) + 1
                    print(f"{op} on {backend}: {fault}\n    {case.command} --backend {backend}", flush=True)
            number += 1
            if options.case is not None:
                break
    print(f"{count} cases of {len(ops)} ops, {sum(failed.values())} failed")
    return int(bool(failed))


def backends(op: str) -> list[str]:
    """The backends that run it here: Triton's kernels in the interpreter alone."""
    if env.triton_interpret():
        return ["triton"] if OPS[op].has_triton else []
    return backends_of(op)


if __name__ == "__main__":
    sys.exit(main())
