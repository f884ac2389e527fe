"""Formats a record of ops as text. Does not import torch, so that reports can be made without it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastllama.bench.text import table

OURS = "fastllama"
ALONE = "fastllama, no overlap"  # launches wait for each other, like those of peers
FORMULAS = ("torch eager", "torch.compile")
HEADER = ("op", "shape", "us", "of a ceiling", *FORMULAS, "torch's own", "error", "bound")
Record = dict[str, Any]


def floor(case: Record, ceilings: Record) -> float:
    """The roofline time in seconds."""
    bytes_floor = case["bytes"] / max(ceilings["copy_bytes_per_second"], ceilings["read_bytes_per_second"])
    return float(max(bytes_floor, case["flops"] / _flops_per_second(ceilings)))


def _flops_per_second(ceilings: Record) -> float:
    """Of a matmul in the measured dtype."""
    (rate,) = (rate for name, rate in ceilings.items() if name.endswith("_flops_per_second"))
    return float(rate)


def median(contender: Record, way: str) -> float | None:
    """Median seconds per call; None where it failed."""
    taken = contender.get(way, {})
    return taken.get("median") if isinstance(taken, dict) else None


def line(case: Record) -> str:
    """A call's time, and that of its fastest peer."""
    own, way = case["contenders"][OURS], _way(case)
    seconds = median(own, way)
    said = f"failed: {own['failed']}" if seconds is None else f"{1e6 * seconds:.1f} us"
    rivals = [(taken, name) for name, each in _peers(case) if (taken := median(each, way)) is not None]
    beside = "".join(f"; {name} {1e6 * taken:.1f} us" for taken, name in sorted(rivals)[:1])
    return f"{case['op']}, {case['label']}: {said}{beside}"


def rows(record: Record) -> Iterator[tuple[str, ...]]:
    """A table row under HEADER for each timed call."""
    for case in record["cases"]:
        own, way = case["contenders"][OURS], _way(case)
        seconds = median(own, way)
        if seconds is None:
            continue
        others = [
            (taken, name)
            for name, each in _peers(case)
            if name not in FORMULAS and (taken := median(each, way)) is not None
        ]
        formulas = (median(case["contenders"].get(name, {}), way) for name in FORMULAS)
        yield (
            f"{case['op']} ({case['backend']})",
            case["label"],
            f"{1e6 * seconds:.1f}",
            f"{100 * floor(case, record['ceilings']) / seconds:.0f} %",
            *("" if taken is None else f"{1e6 * taken:.1f}" for taken in formulas),
            "".join(f"{name}: {1e6 * taken:.1f}" for taken, name in sorted(others)[:1]),
            f"{own['error']:.1e}",
            f"{own['bound']:.1e}",
        )


def failures(record: Record) -> list[str]:
    """Calls that were not measured, with the reason, a line each."""
    failed = [
        f"{case['op']}, {case['label']}: {name} failed: {each['failed']}"
        for case in record["cases"]
        for name, each in case["contenders"].items()
        if "failed" in each
    ]
    return [*failed, *(f"skipped: {text}" for text in record["skipped"])]


def report(record: Record) -> str:
    """The table of a record, with the conditions above and calls not measured below."""
    said, reached = record["conditions"], record["ceilings"]
    copy, read = (reached[f"{name}_bytes_per_second"] / 1e9 for name in ("copy", "read"))
    heading = (
        f"{said['dtype']} on {record['environment']['device']}: a copy moves {copy:.1f} GB/s, a read {read:.1f}, "
        f"a matmul {_flops_per_second(reached) / 1e12:.3g} TFLOP/s; medians in us"
    )
    return "\n\n".join([heading, "\n".join([table([HEADER, *rows(record)]), *failures(record)])])


def _way(case: Record) -> str:
    """The way of timing: in a CUDA graph, if ours was timed so."""
    return "eager" if median(case["contenders"][OURS], "graph") is None else "graph"


def _peers(case: Record) -> list[tuple[str, Record]]:
    return [(name, each) for name, each in case["contenders"].items() if name not in (OURS, ALONE)]
