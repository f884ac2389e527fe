"""A run's figures as Markdown: `python -m benchmarks.ops.report FOLDER` prints FOLDER/results.jsonl as tables.

The floor is the larger of two times: the bytes at the bandwidth that a read or a copy reached in the same run,
whichever was faster, and the operations at the rate that a large matmul reached. A ratio above 1 means that the peer
was slower than this project's op, both without overlapping launches.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu import goals, results
from benchmarks.gpu.goals import Results
from fastllama.bench import decode_report
from fastllama.bench.ops.report import ALONE, OURS, floor, median

HOW = ("outputs given", "allocated")  # of benchmarks.launch_overhead
Row = dict[str, Any]


def table(header: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _ours(cases: list[Row], ceilings: Row, way: str) -> Iterator[tuple[str, ...]]:
    for case in cases:
        own = median(case["contenders"][OURS], way)
        alone = median(case["contenders"].get(ALONE, {}), way) or own
        best = min(
            (
                (seconds, name)
                for name, each in case["contenders"].items()
                if name not in (OURS, ALONE) and (seconds := median(each, way))
            ),
            default=None,
        )
        figures = ("failed", "", "") if own is None else _figures(case, own, ceilings)
        rival = (
            ("", "") if best is None else (f"{best[1]}: {1e6 * best[0]:.1f}", f"{best[0] / alone:.2f}" if alone else "")
        )
        apart = "" if ALONE not in case["contenders"] or alone is None else f"{1e6 * alone:.1f}"
        yield (f"{case['op']} ({case['backend']})", case["label"], *figures, apart, *rival)


def _figures(case: Row, seconds: float, ceilings: Row) -> tuple[str, str, str]:
    share = floor(case, ceilings) / seconds
    return f"{1e6 * seconds:.1f}", f"{case['bytes'] / seconds / 1e9:.0f}", f"{100 * share:.0f} %"


def _blocks(cases: list[Row], way: str) -> Iterator[tuple[str, ...]]:
    for case in cases:
        for name, each in case["contenders"].items():
            seconds, failed = median(each, way), each.get("failed") or each.get(way, {}).get("failed", "")
            figures = ("", "", "") if seconds is None else (f"{1e6 * seconds:.1f}", *_shares(each[way]))
            yield (case["label"], name, *figures, str(len(each.get("launches", ())) or ""), _line(failed))


def _shares(figures: Row) -> tuple[str, str]:
    of_read, of_copy = (f"{100 * figures[ceiling]:.0f} %" for ceiling in ("of_read", "of_copy"))
    return of_read, of_copy


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


def markdown(folder: Path) -> str:
    """Returns the report of a run's results."""
    found = results.read(folder)
    facts = next((line for line in found.get("facts", ()) if "environment" in line), None)
    if facts is None:
        return "# Nothing was measured\n"
    environment = facts["environment"]
    way = "graph" if environment["gpu"] else "eager"
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in facts["libraries"].items())
    parts = [
        f"# {environment['device']}",
        f"fastllama {environment['fastllama']} at {environment['commit']}, torch {environment['torch']}, "
        f"triton {environment['triton']}; {versions}.",
        *_decodes(found),
        *_block(found, way),
        *_launches(found),
        *_ops(found, way),
    ]
    return "\n\n".join(parts) + "\n"


def _records(found: Results, stage: str) -> Iterator[tuple[str, Row]]:
    """Records that the stages of a name wrote, with the stages' full names."""
    for name, lines in found.items():
        if name.startswith(stage):
            yield from ((name, line["record"]) for line in lines if "record" in line)


def _unfinished(found: Results, stage: str) -> Iterator[str]:
    """The stages of a name that did not pass, and the reasons."""
    for name, lines in found.items():
        ended = results.outcome(lines)
        if name.startswith(stage) and ended.get("outcome", "passed") != "passed":
            yield f"{name}: {ended['outcome']}" + (f", {ended['why']}" if "why" in ended else "")


def _decodes(found: Results) -> Iterator[str]:
    yield "## Decode steps of the runtime"
    yield from _unfinished(found, "decode")
    records = [record for _, record in _records(found, "decode")]
    yield table(decode_report.HEADER, (row for record in records for row in decode_report.rows(record)))
    yield from (_line(text) for record in records for text in decode_report.failures(record))


def _block(found: Results, way: str) -> Iterator[str]:
    header = ("shape", "what", "us", "of a read", "of a copy", "launches", "failed")
    yield from _unfinished(found, "block")
    for name, record in _records(found, "block"):
        yield f"## A block's decode step: {name} ({way}, medians)"
        yield table(header, _blocks(record["cases"], way))
        yield from record.get("skipped", ())


def _launches(found: Results) -> Iterator[str]:
    yield from _unfinished(found, "launches")
    for _, record in _records(found, "launches"):
        rows = ((op, *(f"{each[how]['median']:.1f}" for how in HOW)) for op, each in record["ops"].items())
        yield "## Host time of one launch"
        yield table(("op", *(f"{how}, us" for how in HOW)), rows)


def _ops(found: Results, way: str) -> Iterator[str]:
    lines = found.get("ops", ())
    cases = [line["case"] for line in lines if "case" in line]
    reached = goals.ceilings(found)
    if not cases or not reached:
        return
    yield (
        f"A copy reads and writes {reached['copy_bytes_per_second'] / 1e12:.2f} TB/s, a read takes "
        f"{reached['read_bytes_per_second'] / 1e12:.2f} TB/s, a bf16 matmul reaches "
        f"{reached['bf16_flops_per_second'] / 1e12:.1f} TFLOP/s. Cases measured: {len(cases)}, skipped: "
        f"{sum('skipped' in line for line in lines)}."
    )
    yield f"## fastllama beside the fastest peer ({way}, medians)"
    header = ("op", "shape", "us", "GB/s", "of the floor", "us, no overlap", "fastest peer: us", "ratio")
    yield table(header, _ours(cases, dict(reached), way))
    yield "## Everyone"
    yield table(("op", "shape", "what", "graph us", "eager us", "error", "failed"), _everyone(cases))


if __name__ == "__main__":
    print(markdown(Path(sys.argv[1])), end="")
