"""Detects races between programs of one launch: two access an address, one writes, and a GPU does not order them.

A program may read another's stores that precede an atomic update of a counter, after updating the same counter itself:
so the last of several programs can reduce the results of all. A program that reads without being the last is a race
with later stores.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fastllama.testing.floats import Array


@dataclass
class Log:
    """The accesses of one launch: per kind, (program, size, unique addresses) of every program.

    counted: by address of a counter, each program that updated it, and the number of stores before that.
    handed: by program, (program, number of stores) of those that updated a counter before it.
    """

    accesses: dict[str, list[tuple[int, int, Array]]] = field(
        default_factory=lambda: {"load": [], "store": [], "atomic": []}
    )
    counted: dict[int, dict[int, int]] = field(default_factory=dict)
    handed: dict[int, dict[int, int]] = field(default_factory=dict)

    def add(self, kind: str, program: int, size: int, addresses: Array) -> None:
        if kind == "atomic" and addresses.size == 1:
            before = self.counted.setdefault(int(addresses[0]), {})
            self.handed.setdefault(program, {}).update(before)
            before[program] = len(self.accesses["store"])
        elif kind == "load" and program in self.handed:
            addresses = np.setdiff1d(addresses, self._handed_to(program, size), assume_unique=True)
        self.accesses[kind].append((program, size, addresses))

    def _handed_to(self, program: int, size: int) -> Array:
        """The addresses of other programs' stores of `size` bytes that a program may read."""
        stores, ends = self.accesses["store"], self.handed[program]
        found = [each for i, (other, width, each) in enumerate(stores) if i < ends.get(other, 0) and width == size]
        return np.concatenate([*found, np.empty(0, np.uint64)])

    def race(self) -> tuple[str, int, int, int] | None:
        """The kind of race, the address and the two programs; None if the order of the programs does not matter."""
        stored, storers = self._cells("store")
        atomic, updaters = self._cells("atomic")
        loaded, loaders = self._cells("load")
        if not stored.size and not atomic.size:
            return None
        stored, storers = _sorted(stored, storers)
        twice = (stored[1:] == stored[:-1]) & (storers[1:] != storers[:-1])
        if twice.any():
            i = int(np.argmax(twice))
            return "two programs write", int(stored[i]), int(storers[i]), int(storers[i + 1])
        return (
            _meeting("one program reads what another writes,", stored, storers, loaded, loaders)
            or _meeting("one program updates atomically what another writes,", stored, storers, atomic, updaters)
            or _meeting(
                "one program reads what another updates atomically,", *_sorted(atomic, updaters), loaded, loaders
            )
        )

    def _cells(self, kind: str) -> tuple[Array, Array]:
        """Addresses in units of the launch's narrowest access, and the program of each."""
        entries = self.accesses[kind]
        cell = min((size for each in self.accesses.values() for _, size, _ in each), default=1)
        addresses = [_split(each, size, cell) for _, size, each in entries]
        programs = [np.full(each.size, program) for (program, _, _), each in zip(entries, addresses, strict=True)]
        empty = np.empty(0, np.int64)
        return np.concatenate([*addresses, empty]), np.concatenate([*programs, empty])


def _split(addresses: Array, size: int, cell: int) -> Array:
    cells: Array = (addresses.astype(np.int64)[:, None] + np.arange(0, size, cell)).ravel()
    return cells


def _sorted(addresses: Array, programs: Array) -> tuple[Array, Array]:
    order = np.lexsort((programs, addresses))
    return addresses[order], programs[order]


def _meeting(
    what: str, addresses: Array, programs: Array, others: Array, other_programs: Array
) -> tuple[str, int, int, int] | None:
    """The first of `others` at one of the sorted `addresses` of a different program."""
    for side in ("left", "right"):  # among several programs at an address, the first or the last is another one
        at = np.searchsorted(addresses, others, side=side) - (side == "right")
        at = np.clip(at, 0, max(addresses.size - 1, 0))
        clash = (addresses[at] == others) & (programs[at] != other_programs) if addresses.size else np.zeros(0, bool)
        if clash.any():
            i = int(np.argmax(clash))
            return what, int(others[i]), int(programs[at[i]]), int(other_programs[i])
    return None
