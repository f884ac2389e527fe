"""Writes docs/reference/kernels/: the resources of every shipped launch on every target, one page a family."""

from __future__ import annotations

import re
from pathlib import Path

import triton

from fastllama.testing.compile_report import CACHE, COLUMNS, cells, compile_report
from fastllama.testing.resources import KernelReport
from fastllama.testing.targets import TARGETS, target
from tests.kernels.triton.launches import GPUS, SHIPPED, Shipped, on

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "reference" / "kernels"
BACK = "The columns are explained in the [index](index.md)."

INDEX = """# Kernel report

Registers, spills, shared memory, occupancy and instructions of every shipped launch of a Triton kernel, one page for
each family, compiled ahead of time for five GPUs. Made with Triton {version}; written by `make kernels-report` from the
launches in `tests/kernels/triton/launches.py`. The compile tier of the tests fails where a row is out of date.

## Columns

| column | meaning |
|---|---|
| launch | the op or kernel, the model whose sizes it has, the dtype, what is fused |
| target | the GPU: {gpus} |
| warps, stages | `num_warps` and `num_stages` of the launch |
| registers, spilled B, stack B | of one thread; spills are bytes stored and loaded (NVIDIA), 4 a register (AMD) |
| shared KiB | shared memory of a block, of the most that a block may have |
| occupancy | share of a multiprocessor's warps that are resident, and what limits it |
| loads, stores | accesses of global memory by a thread: count x width in bits |
| tensor cores | tensor-core instructions |
| instructions | all instructions |
| a byte | instructions for each byte that the loads and stores move |
| a weight | instructions for each of a thread's quantized weights (int4, int8 and w8a8 alone) |

Loads, stores, tensor-core instructions and instructions are counted in the longest loop that accesses global memory
(`a loop`), or in the whole program where no loop does (`a program`).

## Families

| family | ops | launches |
|---|---|---|
{families}
"""


def page(family: str) -> str:
    """The text of a family's page."""
    body = [row for shipped in SHIPPED[family] for target in TARGETS for row in rows(family, shipped, target)]
    columns = ["launch", *COLUMNS, *(["a weight"] if _has_weights(family) else [])]
    rule = "|" + "---|" * len(columns)
    return "\n".join([f"# {family}\n", f"{BACK}\n", _row(columns), rule, *body]) + "\n"


def index() -> str:
    """The text of index.md: what the columns mean, and the families."""
    families = []
    for family, launches in SHIPPED.items():
        ops = ", ".join(f"`{op}`" for op in dict.fromkeys(map(op_of, launches)))
        families.append(_row([f"[{family}]({family}.md)", ops, str(len(launches))]))
    gpus = ", ".join(f"{name} (`{GPUS[name]}`)" for name in TARGETS)
    return INDEX.format(version=triton.__version__, gpus=gpus, families="\n".join(families))


def op_of(shipped: Shipped) -> str:
    """The op that a launch runs."""
    return shipped.name.split()[0]


def rows(family: str, shipped: Shipped, name: str) -> list[str]:
    """The rows of a family's page on one launch for one target. Raises RuntimeError where it does not compile."""
    with on(name):
        reports = compile_report(shipped.call, [name], ROOT / CACHE)
    for report in reports:
        if report.error:
            raise RuntimeError(f"{shipped.name} for {name}: {report.error}")
    kernels = [report.launch.split("(")[0] for report in reports]
    several = len(reports) > 1
    return [
        _row(
            [
                f"{shipped.name}: {kernel}" if several else shipped.name,
                *cells(report),
                *([_per_weight(shipped, kernel, report)] if _has_weights(family) else []),
            ]
        )
        for kernel, report in zip(kernels, reports, strict=True)
    ]


def _has_weights(family: str) -> bool:
    return any(shipped.weights for shipped in SHIPPED[family])


def _per_weight(shipped: Shipped, kernel: str, report: KernelReport) -> str:
    """The cell under *a weight*; a dash where a kernel reads no quantized weights."""
    threads = report.num_warps * target(report.target).warp_size
    weights = shipped.weights.get(kernel)
    return f"{report.hot.instructions * threads / weights:.2f}" if weights else "-"


def listed(text: str) -> set[tuple[str, str]]:
    """The launches and targets that a page has rows on."""
    found = re.findall(r"^\| ([^|:]+?)(?:: \w+)? \| (sm_\d+|gfx\w+) \|", text, re.MULTILINE)
    return set(found)


def version(text: str) -> str:
    """The Triton version that index.md was made with."""
    (found,) = re.findall(r"Made with Triton ([\w.+]+);", text)
    return str(found)


def _row(texts: list[str]) -> str:
    return f"| {' | '.join(texts)} |"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "index.md").write_text(index(), encoding="utf-8")
    for family in SHIPPED:
        (FOLDER / f"{family}.md").write_text(page(family), encoding="utf-8")
