"""Results file of a run: one JSON object a line, flushed at once, so that an interrupted run keeps its results.

Each line has a "stage". The runner's first line for a stage holds its "limit" in seconds, the stage's own lines hold
its results, the runner's last line an "outcome".
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FILE = "results.jsonl"
CURRENT = "current.json"  # written by the running stage; merged into the results when it ends
Line = dict[str, Any]


def append(path: Path, **line: Any) -> None:
    """Add a line. NaN and infinities become strings: JSON has none."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(_spelled(line), allow_nan=False, default=str) + "\n")


def read(folder: Path) -> dict[str, list[Line]]:
    """A run's lines by stage, in order, including those of a stage that still runs.

    An incomplete last line of an interrupted run is left out.
    """
    last: Line = {}
    found: dict[str, list[Line]] = defaultdict(list)
    path = folder / FILE
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        found[line["stage"]].append(line)
        last = line if "limit" in line or "outcome" in line else last
    if "limit" in last and (folder / CURRENT).exists():
        record = json.loads((folder / CURRENT).read_text(encoding="utf-8"))
        found[last["stage"]].append({"stage": last["stage"], "record": record})
    return dict(found)


def outcome(lines: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The runner's last line of a stage; {} while it runs, or if it was never started."""
    return next((line for line in reversed(lines) if "outcome" in line), {})


def _spelled(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _spelled(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_spelled(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
