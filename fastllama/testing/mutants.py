"""Mutation tests: edits of source files that must make tests fail, and a runner that reports the survivors.

    python -m fastllama.testing.mutants tests/kernels/triton/mutants.py [-k WORD] [-m EXPRESSION] [--shard K/N]

The table is a Python file that defines MUTANTS, a sequence of Mutant; paths are relative to the working directory. The
edits are made in a copy of it, so the working tree is unchanged.
"""

from __future__ import annotations

import argparse
import queue
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from fastllama.testing.shard import Shard

NO_TEST_RAN = 5  # pytest's exit status
TIMEOUT = 600.0  # seconds; a kernel that never ends is caught too
MARKS = ("<!-- mutants -->", "<!-- end of mutants -->")
_NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "venv", "*.egg-info")


@dataclass(frozen=True)
class Mutant:
    """One fault: `old`, which occurs exactly once in the file `path`, becomes `new`.

    tests: pytest's arguments for tests that pass without the fault; at least one must fail with it.
    interpreter: whether they run with TRITON_INTERPRET=1.
    """

    name: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]
    interpreter: bool = True

    def edited(self, root: Path) -> str:
        """The file's text with the fault. Raises ValueError unless `old` occurs in it exactly once."""
        text = (root / self.path).read_text(encoding="utf-8")
        count = text.count(self.old)
        if count != 1 or self.old == self.new:
            raise ValueError(f"mutant {self.name!r}: {self.old!r} stands {count} times in {self.path}; legal: once")
        return text.replace(self.old, self.new)


@dataclass(frozen=True)
class Verdict:
    """The outcome of a mutant: "killed", "survived", "untested" where markers select none of its tests, or "broken"
    where they could not run.

    failure: pytest's line on the first failed test and its reason: a kernel that does not build proves nothing.
    """

    mutant: Mutant
    outcome: str
    failure: str
    seconds: float

    def __str__(self) -> str:
        mutant = f"{self.mutant.path}: {self.mutant.name}"
        return f"{self.outcome:8} {self.seconds:5.1f} s  {mutant}  {self.failure}".rstrip()


def run(mutants: Sequence[Mutant], root: Path, jobs: int = 1, markers: str = "") -> Iterator[Verdict]:
    """Plant each mutant in a copy of `root` and run its tests.

    markers: an expression for pytest's -m, which selects among each mutant's tests.
    Raises ValueError where a mutant does not match its file, RuntimeError where tests fail without any fault, or there
    are none.
    """
    for mutant in mutants:
        mutant.edited(root)
    with ExitStack() as stack:
        copies: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for _ in range(jobs):
            copies.put(stack.enter_context(_copy(root)))
        pool = stack.enter_context(ThreadPoolExecutor(jobs))

        def sound(tests: tuple[tuple[str, ...], bool]) -> None:
            copy = copies.get()
            code, output = _pytest(copy, *tests, markers)
            copies.put(copy)
            if code not in ((0, NO_TEST_RAN) if markers else (0,)):
                raise RuntimeError(f"pytest {' '.join(tests[0])} does not pass without any mutant:\n{output[-2000:]}")

        def verdict(mutant: Mutant) -> Verdict:
            copy, start = copies.get(), time.perf_counter()
            path = copy / mutant.path
            original = path.read_text(encoding="utf-8")
            path.write_text(mutant.edited(copy), encoding="utf-8")
            code, output = _pytest(copy, mutant.tests, mutant.interpreter, markers)
            path.write_text(original, encoding="utf-8")
            copies.put(copy)
            outcomes = {0: "survived", 1: "killed"} | ({NO_TEST_RAN: "untested"} if markers else {})
            outcome = outcomes.get(code, "broken")
            return Verdict(mutant, outcome, _first_failure(output), time.perf_counter() - start)

        list(pool.map(sound, dict.fromkeys((mutant.tests, mutant.interpreter) for mutant in mutants)))
        yield from pool.map(verdict, mutants)


@contextmanager
def _copy(root: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(shutil.copytree(root, Path(folder, "copy"), ignore=_NOT_COPIED))


def _pytest(root: Path, tests: Sequence[str], interpreter: bool, markers: str = "") -> tuple[int, str]:
    """pytest's exit status and output; 1 after a timeout."""
    if markers and "-m" in tests:
        own = tests.index("-m") + 1
        tests = [*tests[:own], f"({tests[own]}) and ({markers})", *tests[own + 1 :]]
    elif markers:
        tests = ["-m", markers, *tests]
    # PYTEST_ADDOPTS of the caller's shell must not apply here.
    variables = ["-u", "PYTEST_ADDOPTS", *(["TRITON_INTERPRET=1"] if interpreter else ["-u", "TRITON_INTERPRET"])]
    # No bytecode: an edit of equal length in the same second would not invalidate it.
    # COLUMNS: pytest cuts the reason of a failure at the terminal's width.
    python = ["env", *variables, "PYTHONDONTWRITEBYTECODE=1", "COLUMNS=240", sys.executable, "-m", "pytest"]
    command = [*python, "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return 1, f"FAILED after {TIMEOUT:g} s"
    return done.returncode, done.stdout + done.stderr


def _first_failure(output: str) -> str:
    failures = (line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR ")))
    return next(failures, "")


def written(page: str, verdicts: Iterable[Verdict]) -> str:
    """A page with the table between its marks replaced: by file, the number of mutants killed, and the survivors."""
    rows: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        rows.setdefault(verdict.mutant.path, []).append(verdict)
    lines = ["| file | mutants | killed | not killed |", "|---|---|---|---|"]
    for path, own in rows.items():
        left = [verdict.mutant.name for verdict in own if verdict.outcome != "killed"]
        name = "/".join(Path(path).parts[-2:])  # with its folder: several folders have files of one name
        lines.append(f"| `{name}` | {len(own)} | {len(own) - len(left)} | {', '.join(left) or '-'} |")
    before, rest = page.split(MARKS[0])
    return "\n".join([before + MARKS[0], "", *lines, "", MARKS[1] + rest.split(MARKS[1])[1]])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for every mutant; returns 1 if one is not killed."""
    parser = argparse.ArgumentParser(prog="python -m fastllama.testing.mutants", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("table", type=Path, help="a Python file that defines MUTANTS")
    parser.add_argument("-k", dest="word", default="", help="only mutants with this text in their name or path")
    parser.add_argument("-m", dest="markers", default="", help="run only tests that this pytest expression selects")
    parser.add_argument(
        "--shard", type=Shard.parse, default=Shard(), help="K/N: the K-th of N parts of the table (default: all)"
    )
    parser.add_argument(
        "--markdown", type=Path, help="Markdown page to write the table of outcomes to, between its marks"
    )
    parser.add_argument("--jobs", type=int, default=1, help="number of parallel runs (default 1)")
    options = parser.parse_args(arguments)
    table: Sequence[Mutant] = runpy.run_path(str(options.table))["MUTANTS"]
    named = [mutant for mutant in table if options.word in f"{mutant.path}: {mutant.name}"]
    if not named:
        parser.error(f"no mutant has {options.word!r} in its name or path; there are {len(table)}")
    chosen = options.shard.of(named)
    verdicts = []
    for verdict in run(chosen, Path.cwd(), options.jobs, options.markers):
        print(verdict, flush=True)
        verdicts.append(verdict)
    if options.markdown:
        options.markdown.write_text(written(options.markdown.read_text(encoding="utf-8"), verdicts), encoding="utf-8")
    killed = sum(verdict.outcome == "killed" for verdict in verdicts)
    print(f"{killed} of {len(chosen)} mutants killed")
    return int(killed < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
