"""Occupancy, against numbers worked out by hand from the vendors' tables."""

from __future__ import annotations

import pytest

from fastllama.testing.targets import TARGETS, Occupancy, occupancy, target

KIB = 1024


@pytest.mark.parametrize(
    ("name", "warps", "registers", "shared", "expected"),
    [
        # 40 registers x 32 threads: 12 warps in each quarter of the registers, 48 in all
        ("sm_90", 8, 36, 0, Occupancy(6, 75, "registers")),
        ("sm_89", 8, 40, 0, Occupancy(6, 100, "warps")),
        ("sm_80", 4, 32, 0, Occupancy(16, 100, "warps")),
        ("sm_80", 1, 16, 0, Occupancy(32, 50, "blocks")),
        # each block takes 1 KiB more than it asks for: 4 x 57 KiB are all there is
        ("sm_90", 4, 32, 56 * KIB, Occupancy(4, 25, "shared memory")),
        ("sm_90", 4, 32, 56 * KIB + 1, Occupancy(3, 18, "shared memory")),
        ("sm_90", 4, 255, 0, Occupancy(2, 12, "registers")),
        ("sm_80", 4, 32, 163 * KIB, Occupancy(1, 6, "shared memory")),
        ("sm_80", 4, 32, 163 * KIB + 1, Occupancy(0, 0, "shared memory")),
        # a block of 1024 threads with 65 registers each needs more than there are
        ("sm_80", 32, 65, 0, Occupancy(0, 0, "registers")),
        ("gfx942", 8, 27, 0, Occupancy(4, 100, "warps")),
        ("gfx942", 4, 129, 0, Occupancy(3, 37, "registers")),
        ("gfx942", 4, 16, 64 * KIB, Occupancy(1, 12, "shared memory")),
        ("gfx942", 2, 16, 0, Occupancy(16, 100, "warps")),
        ("gfx942", 1, 16, 0, Occupancy(32, 100, "warps")),
    ],
)
def test_occupancy(name: str, warps: int, registers: int, shared: int, expected: Occupancy) -> None:
    assert occupancy(TARGETS[name], warps, registers, shared) == expected


@pytest.mark.parametrize(("columns", "blocks", "limiter"), [(0, 16, "warps"), (128, 4, "tensor memory")])
def test_tensor_memory_limits_blackwell(columns: int, blocks: int, limiter: str) -> None:
    found = occupancy(TARGETS["sm_100"], 4, 32, 0, columns)
    assert (found.blocks, found.limiter) == (blocks, limiter)


def test_an_unknown_target() -> None:
    with pytest.raises(ValueError, match=r"^target is 'sm_9' \(did you mean 'sm_90'\?\); legal values: 'sm_80', "):
        target("sm_9")
