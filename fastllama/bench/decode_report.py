"""A record of decode steps as text. Free of torch, as the report of a run is that embeds it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from fastllama.bench.text import milliseconds, table

SHOWN = 12  # kernels of a step; the record holds all
Record = dict[str, Any]
HEADER = ("", "weights", "batch", "context", "tokens/s", "ms a step: p50", "p90", "p99", "GB a step", "of a copy")


def rate(figures: Record) -> str:
    """How fast a case was."""
    return f"{figures['tokens_per_second']:.2f} tokens/s"


def rows(record: Record) -> Iterator[tuple[str, ...]]:
    """A row of cells below HEADER for each case that did not fail."""
    for case in record["cases"]:
        if "failed" not in case:
            yield (
                case["name"],
                case["quantization"],
                str(case["batch"]),
                str(case["context"]),
                f"{case['tokens_per_second']:.2f}",
                *milliseconds(case["seconds"]),
                f"{(case['weight_bytes'] + case['kv_bytes']) / 1e9:.3g}",
                f"{100 * case['of_copy']:.0f} %",
            )


def failures(record: Record) -> list[str]:
    """What was not measured, and why: a line each."""
    failed = [f"{_label(case)}: failed: {case['failed']}" for case in record["cases"] if "failed" in case]
    skipped = [f"skipped: {text}" for text in record.get("skipped", ())]
    return [*failed, *skipped, *(f"{name}: {why}" for name, why in record.get("absent", {}).items())]


def report(record: Record) -> str:
    """The tables of a record: every case, what was not measured, and on a GPU the kernels of each case's step."""
    said, copy = record["conditions"], record["ceilings"]["copy_bytes_per_second"]
    weights = "" if said["checkpoint"] else ", random weights"
    heading = (
        f"{said['model']}, {said['parameters'] / 1e6:,.1f} M parameters{weights}, {said['dtype']} on "
        f"{record['environment']['device']}: {said['tokens']} steps each; a copy moves {copy / 1e9:.1f} GB/s"
    )
    parts = [heading, "\n".join([table([HEADER, *rows(record)]), *failures(record)])]
    parts += [_launches(case) for case in record["cases"] if case.get("launches")]
    return "\n\n".join(parts)


def _launches(case: Record) -> str:
    """The kernels that take the most of a step, and the rest together."""
    found = case["launches"]
    cells = [("kernel", "a step", "us each", "us a step")]
    for row in found[:SHOWN]:
        cells.append((row["name"][:60], f"{row['per_step']:g}", f"{row['us']:.1f}", f"{row['us_per_step']:.1f}"))
    rest, total = found[SHOWN:], sum(row["us_per_step"] for row in found)
    if rest:
        count, us = (sum(row[name] for row in rest) for name in ("per_step", "us_per_step"))
        cells.append((f"{len(rest)} others", f"{count:g}", "", f"{us:.1f}"))
    step = 1e6 * statistics.median(case["seconds"])
    return f"{_label(case)}: {total:.1f} us in kernels of a step of {step:.1f} us\n{table(cells)}"


def _label(case: Record) -> str:
    return f"{case['name']}, {case['quantization']}, batch {case['batch']}, context {case['context']}"
