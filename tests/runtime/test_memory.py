"""How much memory is free, in a container as well."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastllama.runtime import memory

GROUPS = {
    "v2": ("0::/a/b", "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "v1": (
        "3:cpu:/x\n2:memory:/a/b",
        "sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
}


def limited(root: Path, version: str, folders: dict[str, tuple[str, int, int]]) -> list[int]:
    """What container_bytes finds where control groups have a limit, a usage and an idle file cache."""
    membership, mount, limit, used, cache = GROUPS[version]
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(membership + "\n")
    for name, values in folders.items():
        folder = root / mount / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / limit).write_text(f"{values[0]}\n")
        (folder / used).write_text(f"{values[1]}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{cache} {values[2]}\nactive_file 7\n")
    return list(memory.container_bytes(root))


@pytest.mark.parametrize("version", GROUPS)
def test_a_group_and_those_around_it_count(version: str, tmp_path: Path) -> None:
    assert limited(tmp_path, version, {"a/b": ("1000", 400, 50), "a": ("900", 500, 0)}) == [650, 400]


@pytest.mark.parametrize("version", GROUPS)
def test_a_container_sees_its_group_as_the_root(version: str, tmp_path: Path) -> None:
    assert limited(tmp_path, version, {"": ("1000", 400, 0)}) == [600]


def test_a_group_without_a_limit_does_not_count(tmp_path: Path) -> None:
    assert limited(tmp_path, "v2", {"a/b": ("max", 400, 0), "a": ("700", 400, 0)}) == [300]


def test_without_control_groups_nothing_limits(tmp_path: Path) -> None:
    assert list(memory.container_bytes(tmp_path)) == []


def test_the_smallest_is_what_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "container_bytes", lambda: iter([5000, 3000]))
    assert memory.available_bytes(torch.device("cpu")) == 3000
