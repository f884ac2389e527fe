"""Writes docs/reference/kernels.md: resources of every shipped launch on every target; a changed kernel shows as a diff."""

from __future__ import annotations

import re
from pathlib import Path

import triton

from fastllama.testing.compile_report import CACHE, COLUMNS, cells, compile_report
from fastllama.testing.resources import KernelReport
from fastllama.testing.targets import TARGETS, target
from tests.kernels.triton.launches import SHIPPED, Shipped, on

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reference" / "kernels.md"

HEAD = """# What each kernel takes

Made with Triton {version}. Written by `make kernels-report` from the launches in `tests/kernels/triton/launches.py`,
compiled ahead of time for GPUs that need not be there; the compile tier of the tests says when a row is out of date.

Registers, spills and stack are those of one thread; shared memory is that of one block, of what it may take; occupancy
is the share of a multiprocessor's warps that are resident, and what allows no more. Loads and stores are of global
memory, by width in bits, and counted, like the instructions, in the longest loop that touches it, or in the whole
program where there is none. The column *a byte* divides those instructions by the bytes that their loads and stores
move, *a weight* by a thread's share of the 4-bit weights.
"""


def rows(shipped: Shipped, name: str) -> list[str]:
    """The page's rows on one launch for one target. Raises RuntimeError where it does not compile."""
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
                *_per_weight(shipped, kernel, report),
            ]
        )
        for kernel, report in zip(kernels, reports, strict=True)
    ]


def _per_weight(shipped: Shipped, kernel: str, report: KernelReport) -> list[str]:
    """The cell under *a weight*; none where a launch has no 4-bit weights."""
    if not shipped.weights:
        return []
    threads = report.num_warps * target(report.target).warp_size
    weights = shipped.weights.get(kernel)
    return [f"{report.hot.instructions * threads / weights:.2f}" if weights else "-"]


def page() -> str:
    """The text of docs/reference/kernels.md."""
    parts = [HEAD.format(version=triton.__version__)]
    for family, launches in SHIPPED.items():
        body = [row for shipped in launches for target in TARGETS for row in rows(shipped, target)]
        columns = ["launch", *COLUMNS, *(["a weight"] if any(shipped.weights for shipped in launches) else [])]
        rule = "|" + "---|" * len(columns)
        parts.append("\n".join([f"## {family}\n", _row(columns), rule, *body]) + "\n")
    return "\n".join(parts)


def listed(text: str) -> set[tuple[str, str]]:
    """The launches and targets that a page has rows on."""
    found = re.findall(r"^\| ([^|:]+?)(?:: \w+)? \| (sm_\d+|gfx\w+) \|", text, re.MULTILINE)
    return set(found)


def version(text: str) -> str:
    """The Triton version that a page was made with."""
    (found,) = re.findall(r"^Made with Triton ([\w.+]+)\. ", text, re.MULTILINE)
    return str(found)


def _row(texts: list[str]) -> str:
    return f"| {' | '.join(texts)} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
