"""Divides a long run into parts, by position or by a hash of names."""

from __future__ import annotations

import argparse
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """The `part`-th of `count` parts, from 1. The parts are disjoint and complete."""

    part: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Parse "3/12". Raises argparse.ArgumentTypeError, whose message argparse shows."""
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise argparse.ArgumentTypeError(f"shard is {text!r}; legal: K/N with K from 1 to N, such as 3/12")
        return cls(int(found[1]), int(found[2]))

    def holds(self, name: str) -> bool:
        """Whether a name is in this part: by a hash, so that a new test moves no other."""
        return zlib.crc32(name.encode()) % self.count == self.part - 1

    def of(self, things: Sequence[T]) -> list[T]:
        """The items in this part: by position, so that neighbours of one file are spread."""
        return list(things[self.part - 1 :: self.count])
