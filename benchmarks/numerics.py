"""Error of every implementation and of plain torch, as a Markdown table: `python -m benchmarks.numerics`.

The cases and the fp64 formulas are those of `fastllama verify`; docs/design/numerics.md defines the error.
With TRITON_INTERPRET=1 the Triton kernels are included.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from importlib.metadata import version

import torch

from fastllama import env
from fastllama.bench.ops.comparison import implementations, interpreted
from fastllama.kernels.dispatch.backends import Implementation
from fastllama.kernels.dispatch.op import OPS
from fastllama.verify import ops
from fastllama.verify.case import FormulaCase, Results
from fastllama.verify.cases import all_cases
from fastllama.verify.report import error_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CPU = torch.device("cpu")


def run(case: FormulaCase, implementation: Implementation) -> Results:
    """Returns the outputs of an op by one implementation."""
    with OPS[case.op].bound_to(CPU, implementation.run):
        return ops.run(case)


def worst(found: Results, exact: Results) -> float:
    """Returns the largest error of any output."""
    return max(error_of(ours, theirs) for ours, theirs in zip(found, exact, strict=False))


def errors(dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """op -> "plain torch" or backend -> its worst error over the cases, relative to the largest value of the row."""
    table: dict[str, dict[str, float]] = {}
    for op, cases in itertools.groupby(all_cases(dtype), key=lambda case: case.op):
        found: dict[str, float] = defaultdict(float)
        for case in cases:
            exact = case.to(torch.float64).expected()
            plain = case.expected()
            found["plain torch"] = max(found["plain torch"], worst(plain, exact))
            for each in implementations(op, CPU):
                found[each.backend] = max(found[each.backend], worst(run(case, each), exact))
        table[op] = found
    return table


def main() -> None:
    torch.set_num_threads(1)
    with torch.inference_mode(), interpreted(env.triton_interpret()):
        tables = {dtype: errors(dtype) for dtype in DTYPES}
    columns = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    interpreter = f", the interpreter of Triton {version('triton')}" if env.triton_interpret() else ""
    print(f"torch {torch.__version__}, CPU, {torch.backends.cpu.get_cpu_capability()}{interpreter}\n")
    print(f"| op | implementation | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}")
    for op in sorted(OPS):
        for implementation in tables[DTYPES[0]][op]:
            cells = [f"{tables[dtype][op][implementation]:.1e}" for dtype in DTYPES]
            print(f"| {op} | {implementation} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
