"""Test and measure everything on a machine with a GPU, the most valuable first.

python -m benchmarks.gpu --out FOLDER [--minutes 8] [--cache ARCHIVE] [--stages NAME ...] [--dry]

FOLDER then holds results.jsonl (one line per result, written at once), log.txt (the output of every stage), verdict.md
and report.md. The exit status is 1 if an op, a token, a test, a launch, a block or a decode step failed.
--cache: an archive of `python -m tools.gpu_cache`. --stages: only these, after facts and cache. --dry runs the same
stages at toy sizes, on a CPU with TRITON_INTERPRET=1: its times mean nothing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from pathlib import Path

import torch

from benchmarks.gpu import runner, verdict
from benchmarks.gpu.plan import INSTALLED, plan
from benchmarks.ops import report

LEAST, MOST = 4.0, 60.0
ALWAYS = ("facts", "cache")  # without them the report has no heading, and the other stages compile again
VERDICT = "verdict.md"


def main() -> int:
    """Run the stages, write the reports, print the verdict."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=8.0, help="time budget, 4 to 60")
    parser.add_argument("--cache", type=Path, help="archive of compiled kernels")
    parser.add_argument("--stages", nargs="+", help="only these, after facts and cache")
    parser.add_argument("--dry", action="store_true", help="run the stages at toy sizes")
    options = parser.parse_args()
    if not LEAST <= options.minutes <= MOST:
        parser.error(f"--minutes is {options.minutes:g}; legal: {LEAST:g} to {MOST:g}")
    if options.cache is not None and not options.cache.is_file():
        parser.error(f"--cache is {options.cache}, which is no file")
    if not options.dry and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --dry walks the stages without one")
    out, workers = options.out.resolve(), multiprocessing.cpu_count()
    stages = list(plan(out, cache=options.cache and options.cache.resolve(), workers=workers, dry=options.dry))
    if unknown := set(options.stages or ()) - {stage.name for stage in stages}:
        parser.error(f"--stages are {sorted(unknown)}; legal: {', '.join(stage.name for stage in stages)}")
    chosen = [stage for stage in stages if options.stages is None or stage.name in (*ALWAYS, *options.stages)]
    variables = {"TRITON_INTERPRET": "1"} if options.dry else {}
    if options.cache is not None:
        variables["TRITON_CACHE_DIR"] = str(INSTALLED)
    fine = runner.run(chosen, out, options.minutes, variables, after=lambda: write(out))
    print((out / VERDICT).read_text(encoding="utf-8"), end="")
    return int(not fine)


def write(out: Path) -> None:
    """Write report and verdict of the results so far: after each stage, in case the machine is lost."""
    (out / "report.md").write_text(report.markdown(out), encoding="utf-8")
    (out / VERDICT).write_text(verdict.markdown(out), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
