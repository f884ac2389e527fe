"""The state of `checks`: the running launch, its arguments, every access of every program."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import triton

from fastllama.testing.floats import Array
from fastllama.testing.memory import Region, pointers, region
from fastllama.testing.races import Log

# A pointer carries the number of its argument above the 47 bits of a user-space address, through all arithmetic, so
# that an access that leaves its argument is found even inside another one.
TAG = 48
_ADDRESS = np.uint64((1 << TAG) - 1)


class CheckError(AssertionError):
    """A fault that `checks` found: an illegal access, a race, an overflow or a failed assertion.

    The message names argument, program and line where they are known.
    """


@dataclass
class CheckedLaunch:
    """One launch: bytes by argument; repeated accesses count each time, masked-off lanes do not."""

    kernel: str
    grid: tuple[int, int, int] = (0, 0, 0)
    loaded: Counter[str] = field(default_factory=Counter)
    stored: Counter[str] = field(default_factory=Counter)
    updated: Counter[str] = field(default_factory=Counter)  # atomics


@dataclass
class CheckedRun:
    """The launches under `checks`, in order."""

    launches: list[CheckedLaunch] = field(default_factory=list)

    @property
    def bytes_loaded(self) -> int:
        return sum(sum(launch.loaded.values()) for launch in self.launches)

    @property
    def bytes_stored(self) -> int:
        return sum(sum(launch.stored.values()) for launch in self.launches)


class Monitor:
    """The state of the checks; see `checks` for the options."""

    def __init__(
        self, order: str, seed: int, races: bool, allow_races: Iterable[str], memory: Iterable[torch.Tensor]
    ) -> None:
        self.report = CheckedRun()
        self.tags: dict[int, int] = {}
        self._order, self._random, self._races = order, np.random.default_rng(seed), races
        self._allow_races, self._memory = frozenset(allow_races), list(memory)

    def start(self, kernel: str, arguments: Iterable[tuple[str, Any]]) -> None:
        """A launch begins; arguments: every parameter's name and value."""
        self._launch = CheckedLaunch(kernel)
        self.report.launches.append(self._launch)
        own = [pair for name, value in arguments for pair in pointers(value, name)]
        self.tags = {id(value): tag for tag, (_, value) in enumerate(own, 1)}
        more = [(f"memory[{i}]", tensor) for i, tensor in enumerate(self._memory)]
        self._regions = [region(name, value) for name, value in (*own, *more)]
        self._counts = {"load": self._launch.loaded, "store": self._launch.stored, "atomic": self._launch.updated}
        self._log = Log()

    def permute(self, grid: tuple[int, int, int]) -> None:
        """Choose the order of the programs of a grid."""
        self._launch.grid = grid
        numbers = np.arange(grid[0] * grid[1] * grid[2])
        if self._order == "shuffle":
            self._random.shuffle(numbers)
        self._programs = iter(numbers[::-1] if self._order == "reverse" else numbers)

    def next_program(self) -> tuple[int, int, int]:
        """Advance to the next program, and return its index."""
        self._program = int(next(self._programs))
        return self._index(self._program)

    def _index(self, program: int) -> tuple[int, int, int]:
        _, y, z = self._launch.grid
        return program // (y * z), program // z % y, program % z

    def access(self, kind: str, tagged: Array, mask: Any, size: int, value: Array | None = None) -> Array:
        """Check one "load", "store" or "atomic" of `size` bytes per lane. Returns the addresses without tags."""
        tagged = np.asarray(tagged)
        active = np.broadcast_to(np.asarray(mask, dtype=bool), tagged.shape)
        lanes = tagged[active]
        if lanes.size:
            tags = lanes >> np.uint64(TAG)
            tag = int(tags[0])
            addresses = lanes & _ADDRESS
            for each in [tag] if (tags == tag).all() else np.unique(tags).tolist():
                self._inside(kind, each, addresses[tags == each], size)
            self._aligned(kind, tag, addresses, size)
            if self._races and self._name(tag) not in self._allow_races:
                self._log.add(kind, self._program, size, np.unique(addresses))
                if value is not None:
                    self._one_value(tag, addresses, np.broadcast_to(value, tagged.shape)[active])
        plain: Array = tagged & _ADDRESS
        return plain

    def _name(self, tag: int) -> str:
        return self._regions[tag - 1].name if 0 < tag <= len(self.tags) else "no argument"

    def _inside(self, kind: str, tag: int, addresses: Array, size: int) -> None:
        if 0 < tag <= len(self.tags):
            own = self._regions[tag - 1]
            self._counts[kind][own.name] += addresses.size * size
            wrong = own.misses(addresses, size)
            if wrong.any():
                self._fail_at(f"{kind} out of bounds of {own}", own, addresses, size, wrong)
            return
        lost = np.ones(addresses.size, dtype=bool)  # the pointer was itself loaded, or derives from no argument
        for each in self._regions:
            found = lost & ~each.misses(addresses, size)
            if found.any():
                self._counts[kind][each.name] += int(found.sum()) * size
                lost &= ~found
        if lost.any():
            address = int(addresses[np.argmax(lost)])
            nearest = min(self._regions, key=lambda each: each.distance(address))
            self._fail_at(f"{kind} in no argument, the nearest is {nearest}", nearest, addresses, size, lost)

    def _fail_at(self, what: str, near: Region, addresses: Array, size: int, wrong: Array) -> NoReturn:
        first = near.where(int(addresses[np.argmax(wrong)]), size)
        self.fail(f"{what}: {int(wrong.sum())} of {wrong.size} lanes, the first {first}")

    def _aligned(self, kind: str, tag: int, addresses: Array, size: int) -> None:
        wrong = addresses % np.uint64(size) != 0
        if wrong.any():
            self.fail(f"misaligned {kind} of {size} B in {self._name(tag)}: {int(wrong.sum())} of {wrong.size} lanes")

    def _one_value(self, tag: int, addresses: Array, values: Array) -> None:
        order = np.argsort(addresses, kind="stable")
        addresses, bits = addresses[order], values[order].view(f"u{values.itemsize}")
        if ((addresses[1:] == addresses[:-1]) & (bits[1:] != bits[:-1])).any():
            self.fail(f"one store writes two values to one address of {self._name(tag)}")

    def overflow(self, kind: Any, operation: str, lhs: Array, rhs: Array) -> None:
        """Check an integer operation of Triton's type `kind`: "add", "sub" or "mul"."""
        if kind.int_bitwidth >= 64 or kind.int_bitwidth == 1:
            return
        compute = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[operation]
        exact = compute(lhs, rhs, dtype=np.int64)
        wrong = (exact < kind.get_int_min_value()) | (exact > kind.get_int_max_value())
        if wrong.any():
            first = int(exact[wrong].flat[0])
            self.fail(f"{kind} overflow in {operation}: {int(wrong.sum())} of {wrong.size} lanes, the first is {first}")

    def finish(self) -> None:
        """End the launch: check for races."""
        race = self._log.race()
        if race is None:
            return
        what, address, *programs = race
        cell = np.array([address], dtype=np.uint64)
        name = next((str(each) for each in self._regions if not each.misses(cell, 1).any()), "memory")
        one, other = (self._index(program) for program in programs)
        raise CheckError(f"race in {self._launch.kernel}: {what} {name}; programs {one} and {other}")

    def fail(self, what: str) -> NoReturn:
        """Raise CheckError for the running program."""
        raise CheckError(f"{what}; program {self._index(self._program)} of {self._launch.kernel}, {_line()}")


_NOT_KERNELS = tuple(f"{Path(path).parent}{os.sep}" for path in (triton.__file__, __file__))


def _line() -> str:
    """The running line of the kernel."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_KERNELS):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
