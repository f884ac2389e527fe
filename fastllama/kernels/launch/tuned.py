"""Files of tuned launch configurations, strictly checked: a broken or foreign file is an error, not a slow kernel.

{"op": "norm", "gpu": "nvidia-h200",
 "provenance": {"fastllama": "0.1.0", "triton": "3.6.0", "command": "...", ...},      every value a string
 "launches": [{"shape": {"size": 4096, "itemsize": 2}, "launch": {"num_warps": 8},
               "microseconds": 30.1, "heuristic_microseconds": 31.0}, ...]}
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fastllama.errors import TuningError, brief

Shape = dict[str, int]


@dataclass(frozen=True)
class TunedLaunch:
    """One tuned shape: its launch, and the times of that launch and of the heuristic's launch."""

    shape: Shape
    launch: Any
    microseconds: float
    heuristic_microseconds: float


def read(path: Path, op: str, gpu: str, shape: tuple[str, ...], launch: type[Any]) -> list[TunedLaunch]:
    """The entries of a file; none if it does not exist. Raises TuningError, which names the file and the field."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise TuningError(f"{path}: cannot be read: {error}") from None
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise TuningError(f"{path}: is not JSON: {error}") from None
    _check_names(path, "the file", found, ("op", "gpu", "provenance", "launches"))
    for name, own in (("op", op), ("gpu", gpu)):
        if found[name] != own:
            raise TuningError(f"{path}: {name} is {found[name]!r}; legal here: {own!r}")
    if not isinstance(found["provenance"], dict) or not all(isinstance(v, str) for v in found["provenance"].values()):
        raise TuningError(f"{path}: provenance is {brief(found['provenance'])}; legal: an object of strings")
    if not isinstance(found["launches"], list):
        raise TuningError(f"{path}: launches is {brief(found['launches'])}; legal: a list")
    entries = [_entry(path, f"launches[{i}]", each, shape, launch) for i, each in enumerate(found["launches"])]
    shapes = [entry.shape for entry in entries]
    for i, each in enumerate(shapes):
        if (first := shapes.index(each)) < i:
            raise TuningError(
                f"{path}: launches[{i}].shape is {each}, as launches[{first}].shape is; legal: each shape once"
            )
    return entries


def write(path: Path, op: str, gpu: str, provenance: Mapping[str, str], entries: Iterable[TunedLaunch]) -> None:
    """Write a file for `read`, and create its folder; a reader sees the old file or the new one, never a part."""
    found = {"op": op, "gpu": gpu, "provenance": dict(provenance), "launches": [asdict(entry) for entry in entries]}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def nearest(entries: Iterable[TunedLaunch], shape: Shape) -> Any | None:
    """The launch tuned for `shape` at the nearest rows (in powers of two); None if no entry has its other sizes."""
    others = {name: value for name, value in shape.items() if name != "rows"}
    fitting = [entry for entry in entries if others.items() <= entry.shape.items()]
    if not fitting:
        return None
    rows = max(shape.get("rows", 1), 1)
    return min(fitting, key=lambda entry: abs(math.log2(entry.shape.get("rows", rows) / rows))).launch


def _entry(path: Path, where: str, found: Any, shape: tuple[str, ...], launch: type[Any]) -> TunedLaunch:
    _check_names(path, where, found, [each.name for each in fields(TunedLaunch)])
    _check_names(path, f"{where}.shape", found["shape"], shape)
    _check_names(path, f"{where}.launch", found["launch"], [each.name for each in fields(launch)])
    for part in ("shape", "launch"):
        for name, value in found[part].items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise TuningError(f"{path}: {where}.{part}.{name} is {value!r}; legal: an integer of at least 1")
            if part == "launch" and name != "stages" and value & (value - 1):
                raise TuningError(f"{path}: {where}.launch.{name} is {value}; legal: a power of two")
    for name in ("microseconds", "heuristic_microseconds"):
        value = found[name]
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
            raise TuningError(f"{path}: {where}.{name} is {value!r}; legal: a positive number")
    return TunedLaunch(
        found["shape"], launch(**found["launch"]), found["microseconds"], found["heuristic_microseconds"]
    )


def _check_names(path: Path, where: str, found: Any, names: Iterable[str]) -> None:
    """Raise TuningError unless `found` is an object with exactly these names."""
    if not isinstance(found, dict):
        raise TuningError(f"{path}: {where} is {brief(found)}; legal: an object")
    legal = list(names)
    for name in legal:
        if name not in found:
            raise TuningError(f"{path}: {where} lacks {name!r}")
    for name in found:
        if name not in legal:
            raise TuningError(f"{path}: {where} has an unknown field {name!r}; legal: {', '.join(legal)}")
