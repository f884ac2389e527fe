"""A run's figures as Markdown: `python -m benchmarks.report FOLDER` prints FOLDER/bench.json as tables.

The floor is the larger of two times: of the bytes at the bandwidth that a copy reached in the same run, and of the
operations at the rate that a product reached. A ratio above 1 is a peer that was slower.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastllama.bench import decode_report

OURS = "fastllama"
HOW = ("outputs given", "allocated")  # of benchmarks.launch_overhead
Row = dict[str, Any]


def floor(case: Row, ceilings: Row) -> float:
    """The seconds below which no implementation can be."""
    bytes_floor = case["bytes"] / ceilings["copy_bytes_per_second"]
    return float(max(bytes_floor, case["flops"] / ceilings["bf16_flops_per_second"]))


def median(contender: Row, way: str) -> float | None:
    """Seconds of a call; None where it failed."""
    taken = contender.get(way, {})
    return taken.get("median") if isinstance(taken, dict) else None


def table(header: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _ours(cases: list[Row], ceilings: Row, way: str) -> Iterator[tuple[str, ...]]:
    for case in cases:
        own = median(case["contenders"][OURS], way)
        best = min(
            (
                (seconds, name)
                for name, each in case["contenders"].items()
                if name != OURS and (seconds := median(each, way))
            ),
            default=None,
        )
        figures = ("failed", "", "") if own is None else _figures(case, own, ceilings)
        rival = ("", "") if best is None else (f"{best[1]}: {1e6 * best[0]:.1f}", f"{best[0] / own:.2f}" if own else "")
        yield (f"{case['op']} ({case['backend']})", case["label"], *figures, *rival)


def _figures(case: Row, seconds: float, ceilings: Row) -> tuple[str, str, str]:
    share = floor(case, ceilings) / seconds
    return f"{1e6 * seconds:.1f}", f"{case['bytes'] / seconds / 1e9:.0f}", f"{100 * share:.0f} %"


def _blocks(cases: list[Row], way: str) -> Iterator[tuple[str, ...]]:
    for case in cases:
        for name, each in case["contenders"].items():
            seconds, failed = median(each, way), each.get("failed") or each.get(way, {}).get("failed", "")
            figures = ("", "") if seconds is None else (f"{1e6 * seconds:.1f}", f"{100 * each[way]['of_copy']:.0f} %")
            yield (case["label"], name, *figures, str(len(each.get("launches", ())) or ""), _line(failed))


def _everyone(cases: list[Row]) -> Iterator[tuple[str, ...]]:
    for case in cases:
        for name, each in case["contenders"].items():
            cells = []
            for way in ("graph", "eager"):
                seconds = median(each, way)
                cells.append("" if seconds is None else f"{1e6 * seconds:.1f}")
            failed = [each.get("failed"), *(each[way].get("failed") for way in ("graph", "eager") if way in each)]
            error = f"{each['error']:.1e}" if "error" in each else ""
            yield (case["op"], case["label"], name, *cells, error, "; ".join(_line(text) for text in failed if text))


def _line(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")[:100]


def markdown(record: Row) -> str:
    """The whole report."""
    environment, ceilings, cases = record["environment"], record["ceilings"], record["cases"]
    way = "graph" if environment["gpu"] else "eager"
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in record["libraries"].items())
    parts = [
        f"# {environment['device']}, {record['conditions']['dtype']}",
        f"fastllama {environment['fastllama']} at {environment['commit']}, torch {environment['torch']}, "
        f"triton {environment['triton']}; {versions}.\n"
        f"A copy reads and writes {ceilings['copy_bytes_per_second'] / 1e12:.2f} TB/s, a bf16 product reaches "
        f"{ceilings['bf16_flops_per_second'] / 1e12:.1f} TFLOP/s.\n"
        f"Tests: {record['tests']['outcome']}. Cases measured: {len(cases)}, skipped: {len(record['skipped'])}.",
        f"## fastllama beside the fastest peer ({way}, medians)",
        table(("op", "shape", "us", "GB/s", "of the floor", "fastest peer: us", "ratio"), _ours(cases, ceilings, way)),
    ]
    launches = record["launch_overhead"]
    rows = ((op, *(f"{each[how]['median']:.1f}" for how in HOW)) for op, each in launches["ops"].items())
    host = launches.get("failed") or table(("op", *(f"{how}, us" for how in HOW)), rows)
    parts += ["## Host time of one launch", host]
    block = record["block"]
    header = ("shape", "what", "us", "of a copy", "launches", "failed")
    ended = [text for text in (block.get("failed"), block.get("cut_short"), *block.get("skipped", ())) if text]
    parts += [f"## A block's decode step ({way}, medians)", table(header, _blocks(block["cases"], way)), *ended]
    decode = record["decode"]
    parts += ["## Decode steps of the runtime", table(decode_report.HEADER, decode_report.rows(decode))]
    parts += [text for text in (decode.get("failed"), decode.get("cut_short"), decode.get("not_run")) if text]
    parts += [_line(text) for text in decode_report.failures(decode)]
    header = ("op", "shape", "what", "graph us", "eager us", "error", "failed")
    parts += ["## Everyone", table(header, _everyone(cases))]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(markdown(json.loads((Path(sys.argv[1]) / "bench.json").read_text(encoding="utf-8"))), end="")
