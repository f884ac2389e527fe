"""Runs the stages one after another within a time budget; their output goes into one log."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu import results
from benchmarks.gpu.plan import Stage
from benchmarks.gpu.results import CURRENT, FILE

ROOT = Path(__file__).parents[2]
LOG = "log.txt"
NO_TEST_RAN = 5  # pytest's exit status
TAIL = 12  # last lines of a failed stage that are printed at once
GRACE = 10.0  # seconds at the end, for the report


def run(
    stages: Iterable[Stage],
    out: Path,
    minutes: float,
    variables: Mapping[str, str],
    after: Callable[[], None] = lambda: None,
) -> bool:
    """Run the stages; returns whether none failed. variables: environment of each. after: called after each."""
    out.mkdir(parents=True, exist_ok=True)
    for name in (FILE, LOG, CURRENT):
        (out / name).unlink(missing_ok=True)
    end = time.monotonic() + 60 * minutes - GRACE
    fine = True
    for stage in stages:
        missing = [name for name in stage.needs if importlib.util.find_spec(name) is None]
        limit = stage.limit(minutes, end - time.monotonic())
        found: dict[str, Any] = {"outcome": "skipped"}
        if missing:
            found["why"] = f"{' and '.join(missing)} not installed"
        elif not limit:
            found["why"] = f"{max(end - time.monotonic(), 0):.0f} s left, {stage.least} wanted"
        else:
            results.append(out / FILE, stage=stage.name, limit=limit)
            found = _run(stage, out, limit, variables)
        results.append(out / FILE, stage=stage.name, **found)
        fine = fine and found["outcome"] != "failed"
        print(f"{stage.name}: {found['outcome']}{_said(found)}", flush=True)
        after()
    return fine


def _run(stage: Stage, out: Path, limit: float, variables: Mapping[str, str]) -> dict[str, Any]:
    log, current = out / LOG, out / CURRENT
    argv = [*stage.argv, *(("--output", str(current)) if stage.writes else ())]
    given = [f"{name}={value}" for name, value in (variables | dict(stage.variables)).items()]
    start = time.monotonic()
    with log.open("a", encoding="utf-8") as file:
        print(
            f"\n=== {stage.name}: {' '.join(given)} python {' '.join(argv)} (at most {limit:.0f} s)",
            file=file,
            flush=True,
        )
        said = file.tell()
        status = _ended([*given, sys.executable, *argv], file, limit)
    outcome = {0: "passed", NO_TEST_RAN: "no test here", None: "cut short"}.get(status, "failed")
    found: dict[str, Any] = {"outcome": outcome, "status": status, "seconds": round(time.monotonic() - start, 1)}
    if current.exists():
        found["record"] = json.loads(current.read_text(encoding="utf-8"))
        current.unlink()
    if outcome == "failed":
        with log.open(encoding="utf-8", errors="replace") as file:
            file.seek(said)
            found["tail"] = [line.rstrip() for line in file if line.strip()][-TAIL:]
    return found


def _ended(command: list[str], log: Any, seconds: float) -> int | None:
    """Run a command; returns its exit status, None if it and its children had to be killed at the time limit.

    command: arguments of `env`, variables first. PYTEST_ADDOPTS of the caller's shell is removed.
    """
    command = ["env", "-u", "PYTEST_ADDOPTS", *command]
    process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        return process.wait(seconds)
    except BaseException as stopped:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if not isinstance(stopped, subprocess.TimeoutExpired):
            raise
        return None


def _said(found: Mapping[str, Any]) -> str:
    why = f" ({found['why']})" if "why" in found else f" in {found['seconds']:.0f} s"
    return "\n    ".join([why, *found.get("tail", ())])
