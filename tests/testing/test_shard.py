"""Shards of a long run: together they run every test exactly once."""

from __future__ import annotations

import argparse

import pytest

from fastllama.testing.shard import Shard


@pytest.mark.parametrize("count", [1, 2, 7])
def test_together_they_are_everything_once(count: int) -> None:
    names = [f"tests/test_{i}.py::test[{i}]" for i in range(40)]
    shards = [Shard.parse(f"{part}/{count}") for part in range(1, count + 1)]
    assert sorted(name for shard in shards for name in names if shard.holds(name)) == sorted(names)
    assert sorted(name for shard in shards for name in shard.of(names)) == sorted(names)
    assert all(len(shard.of(names)) in (40 // count, -(-40 // count)) for shard in shards)


def test_a_name_stays_in_its_part() -> None:
    """In another process too, so that a failure can be reproduced."""
    assert [name for name in "abcdefgh" if Shard(1, 3).holds(name)] == ["a", "c", "d", "e", "h"]


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "1/0", "a/b", "-1/3", "1/3/"])
def test_what_is_no_shard(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=rf"^shard is '{text}'; legal: K/N with K from 1 to N"):
        Shard.parse(text)
