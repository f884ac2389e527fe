"""Compiles a kernel's launches for GPUs that need not be present: registers, spills, shared memory, instructions.

`python -m fastllama.testing.compile_report module:function` reports on the launches of a function without arguments
(docs/kernels/testing.md).
"""

from __future__ import annotations

import argparse
import functools
import gzip
import hashlib
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastllama.testing import triton_api
from fastllama.testing.recorder import Launch, record
from fastllama.testing.resources import KernelReport, compile_launch
from fastllama.testing.targets import TARGETS, target

CACHE = Path("build", "compile_reports")
REPORT, CODE = ".json", ".code.gz"  # file suffixes per launch, in that folder


def compile_report(
    function: Callable[[], Any], targets: Iterable[str] = tuple(TARGETS), cache: Path | None = CACHE
) -> list[KernelReport]:
    """Reports on every distinct launch of `function` (see recorder.record), for each target.

    cache: a folder of reports, keyed by a hash of everything they depend on; None caches nothing.
    Raises ValueError for an unknown target, and where `function` launches nothing.
    """
    reports: dict[tuple[str, str], KernelReport] = {}
    for name in targets:
        with record(target(name)) as launches:
            function()
        if not launches:
            raise ValueError("the function launched no Triton kernel")
        for launch in launches:
            key = _key(launch)
            if (name, key) not in reports:
                reports[name, key] = _report(launch, None if cache is None else cache / key)
    return sorted(reports.values(), key=lambda report: report.launch)


def machine_code_of(launch: Launch, cache: Path | None = CACHE) -> str:
    """A launch's machine code as text, from the cache where it has been compiled before."""
    path = None if cache is None else cache / _key(launch)
    if path is not None and path.with_suffix(CODE).exists():
        return gzip.decompress(path.with_suffix(CODE).read_bytes()).decode()
    report, text = _compile(launch, path)
    if report.error:
        raise RuntimeError(report.error)
    return text


def _counts(counts: Mapping[str, int]) -> str:
    """{"128": 6, "async 128": 2} as "6x128 2xasync 128"."""
    return " ".join(f"{count}x{name}" for name, count in counts.items()) or "-"


def _per_byte(report: KernelReport) -> str:
    found = report.hot.instructions_per_byte
    return "-" if found is None else f"{found:.2f}"


# Counts are per iteration of the hot loop, or of the whole program without a loop.
COLUMNS: dict[str, Callable[[KernelReport], str]] = {
    "target": lambda report: report.target,
    "warps": lambda report: str(report.num_warps),
    "stages": lambda report: str(report.num_stages),
    "registers": lambda report: str(report.registers),
    "spilled B": lambda report: str(report.spilled_bytes),
    "stack B": lambda report: str(report.stack_bytes),
    "shared KiB": lambda report: f"{report.shared_bytes / 1024:.1f} of {report.shared_limit // 1024}",
    "occupancy": lambda report: f"{report.occupancy.percent} % ({report.occupancy.limiter})",
    "loads": lambda report: _counts(report.hot.loads),
    "stores": lambda report: _counts(report.hot.stores),
    "tensor cores": lambda report: _counts(report.hot.matrix),
    "instructions": lambda report: f"{report.hot.instructions} a {'loop' if report.loops else 'program'}",
    "a byte": _per_byte,
}


def cells(report: KernelReport) -> list[str]:
    """A report as a table row under COLUMNS; dashes for an error."""
    return [report.target, *("-" if report.error else text(report) for text in list(COLUMNS.values())[1:])]


def table(reports: Sequence[KernelReport]) -> str:
    """Plain text: the rows of each launch, and its problems below them."""
    lines = []
    for launch in dict.fromkeys(report.launch for report in reports):
        own = [report for report in reports if report.launch == launch]
        rows = [list(COLUMNS), *map(cells, own)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines.append(launch)
        for row in rows:
            padded = (text.ljust(width) for text, width in zip(row, widths, strict=True))
            lines.append("  " + "  ".join(padded).rstrip())
        lines += [f"  {report.target}: {problem}" for report in own for problem in report.problems()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status, 1 if there is any problem."""
    parser = argparse.ArgumentParser(
        prog="python -m fastllama.testing.compile_report",
        description="Compile a function's launches for GPUs that need not be present, and report their resources.",
    )
    parser.add_argument(
        "function", metavar="module:function", help="a function without arguments; its tensors may be on `meta`"
    )
    parser.add_argument("--targets", default=",".join(TARGETS), help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of cached reports (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        reports = compile_report(_function(options.function), options.targets.split(","), options.cache)
    except (ValueError, ImportError, RuntimeError) as error:
        parser.error(str(error))
    if options.json:
        print(json.dumps([{**report.to_json(), "problems": report.problems()} for report in reports], indent=1))
    else:
        print(table(reports))
    return int(any(report.problems() for report in reports))


def _function(name: str) -> Callable[[], Any]:
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"function is {name!r}; legal: module:function")
    found = getattr(importlib.import_module(module), attribute, None)
    if not callable(found):
        raise ValueError(f"module {module} has no function {attribute!r}")
    return found


def _report(launch: Launch, path: Path | None) -> KernelReport:
    """The report at `path` where it exists, else a new one, which is written there."""
    if path is not None and path.with_suffix(REPORT).exists():
        return KernelReport.from_json(json.loads(path.with_suffix(REPORT).read_text(encoding="utf-8")))
    return _compile(launch, path)[0]


def _compile(launch: Launch, path: Path | None) -> tuple[KernelReport, str]:
    """Compile; the report and the machine code are written next to `path`."""
    try:
        report, text = compile_launch(launch)
    except triton_api.ToolMissingError as error:
        return KernelReport(str(launch), launch.target.name, error=f"cannot be compiled here: {error}"), ""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if text:
            _write(path.with_suffix(CODE), gzip.compress(text.encode(), 1))
        _write(path.with_suffix(REPORT), json.dumps(report.to_json()).encode())
    return report, text


def _write(path: Path, content: bytes) -> None:
    """Write atomically, since processes share the folder."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.replace(file.name, path)


def _key(launch: Launch) -> str:
    """A hash of everything a report depends on: source, specialisation, options, Triton, and the parser."""
    parts = (launch.source.hash(), sorted(map(str, launch.options.items())), launch.target, str(launch), _reader())
    return hashlib.sha256(repr((*parts, triton_api.compiler_state())).encode()).hexdigest()


@functools.cache
def _reader() -> str:
    """The content of the files that parse machine code."""
    names = ("machine_code.py", "resources.py", "targets.py", "triton_api.py")
    return hashlib.sha256(b"".join((Path(__file__).parent / name).read_bytes() for name in names)).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
