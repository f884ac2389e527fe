"""A record of ops as text. Free of torch, as the report of a run is that embeds it."""

from __future__ import annotations

from typing import Any

OURS = "fastllama"
ALONE = "fastllama, no overlap"  # its launches wait for each other, as those of peers do
Record = dict[str, Any]


def floor(case: Record, ceilings: Record) -> float:
    """The seconds below which no implementation can be."""
    bytes_floor = case["bytes"] / max(ceilings["copy_bytes_per_second"], ceilings["read_bytes_per_second"])
    return float(max(bytes_floor, case["flops"] / ceilings["bf16_flops_per_second"]))


def median(contender: Record, way: str) -> float | None:
    """Seconds of a call; None where it failed."""
    taken = contender.get(way, {})
    return taken.get("median") if isinstance(taken, dict) else None
