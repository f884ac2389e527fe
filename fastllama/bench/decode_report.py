"""Formats a record of decode steps as text. Does not import torch, so that reports can be made without it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from fastllama import env
from fastllama.bench.text import milliseconds, table
from fastllama.errors import counted

SHOWN = 12  # kernels listed per step; the record has all
SPENT = ("us_per_step", "end_to_end_us_per_step")
Record = dict[str, Any]
HEADER = (
    "",
    "weights",
    "batch",
    "context",
    "tokens/s",
    "ms a step: p50",
    "p90",
    "p99",
    "GB a step",
    "of a read",
    "of a copy",
)


def rate(figures: Record) -> str:
    """A case's tokens per second, as text."""
    return f"{figures['tokens_per_second']:.2f} tokens/s"


def rows(record: Record) -> Iterator[tuple[str, ...]]:
    """A table row under HEADER for each successful case."""
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
                *(f"{100 * case[ceiling]:.0f} %" for ceiling in ("of_read", "of_copy")),
            )


def failures(record: Record) -> list[str]:
    """Cases that were not measured, with the reason, a line each."""
    failed = [f"{_label(case)}: failed: {case['failed']}" for case in record["cases"] if "failed" in case]
    skipped = [f"skipped: {text}" for text in record.get("skipped", ())]
    return [*failed, *skipped, *(f"{name}: {why}" for name, why in record.get("absent", {}).items())]


def report(record: Record) -> str:
    """The tables of a record: every case, cases not measured, and on a GPU the kernels of each case's step."""
    said = record["conditions"]
    copy, read = (record["ceilings"][f"{name}_bytes_per_second"] / 1e9 for name in ("copy", "read"))
    weights = "" if said["checkpoint"] else ", random weights"
    heading = (
        f"{said['model']}, {said['parameters'] / 1e6:,.1f} M parameters{weights}, {said['dtype']} on "
        f"{record['environment']['device']}{_moved(record)}: {counted(said['tokens'], 'step')} each; a copy moves "
        f"{copy:.1f} GB/s, a read {read:.1f}"
    )
    parts = [heading, "\n".join([table([HEADER, *rows(record)]), *failures(record)])]
    parts += [_launches(case) for case in record["cases"] if case.get("launches")]
    return "\n\n".join(parts)


def _moved(record: Record) -> str:
    """The environment variables that were not at their defaults."""
    found = record["environment"]["switches"]
    moved = [each.name for each in env.VARIABLES if found.get(each.name, each.default) != each.default]
    return "".join(f", {name}={found[name]}" for name in moved)


def _launches(case: Record) -> str:
    """The kernels that take most of a step, and the others combined."""
    found = case["launches"]
    cells: list[tuple[str, ...]] = [("kernel", "a step", "us each", "us a step", "end to end")]
    for row in found[:SHOWN]:
        each, *spent = (f"{row[name]:.1f}" for name in ("us", *SPENT))
        cells.append((row["name"][:60], f"{row['per_step']:g}", each, *spent))
    rest = found[SHOWN:]
    if rest:
        count, *spent = (sum(row[name] for row in rest) for name in ("per_step", *SPENT))
        cells.append((counted(len(rest), "other"), f"{count:g}", "", *(f"{us:.1f}" for us in spent)))
    durations, span = (sum(row[name] for row in found) for name in SPENT)
    step = 1e6 * statistics.median(case["seconds"])
    head = (
        f"{_label(case)}: {span:.1f} us end to end, kernels' durations {durations:.1f} us, of a step of {step:.1f} us"
    )
    return f"{head}\n{table(cells)}"


def _label(case: Record) -> str:
    return f"{case['name']}, {case['quantization']}, batch {case['batch']}, context {case['context']}"
