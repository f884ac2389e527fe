"""Reads the log of a process on the fake GPU: launches, captures, violations."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Log:
    """Log of one or more processes. launches, loads: by kernel. captures: kernels of each, and how many overlap.

    compilations: the specialisation of each compiled kernel, as `tools.gpu_cache` reads it, in order.
    """

    violations: Counter[str] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)
    loads: Counter[str] = field(default_factory=Counter)
    captures: list[tuple[int, int]] = field(default_factory=list)
    replays: int = 0
    compilations: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        """Add a line."""
        kind, _, rest = line.rstrip("\n").partition(" ")
        words = rest.split()
        if kind == "VIOLATION":
            self.violations[rest] += 1
        elif kind == "launch":
            self.launches[words[0]] += 1
        elif kind == "load":
            self.loads[words[0]] += 1
        elif kind == "capture" and words[0] == "ends":
            self.captures.append((int(words[2]), int(words[4])))
        elif kind == "graph":
            self.replays += 1
        elif kind == "compile":
            self.compilations.append(rest)

    def __str__(self) -> str:
        captured, overlapping = (sum(each) for each in zip((0, 0), *self.captures, strict=True))
        return (
            f"{len(set(self.compilations))} kernels of ours, {sum(self.launches.values())} launches, "
            f"{len(self.captures)} captures of {captured} kernels, of which {overlapping} overlap, "
            f"{self.replays} replays"
        )


def read(path: Path) -> Log:
    """Read the logs of all processes that ran with FAKEGPU_LOG=path."""
    log = Log()
    for file in sorted(path.parent.glob(f"{path.name}.*")):
        with file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                log.add(line)
    return log
