"""Verdict of a run, in the order in which to act on it: `python -m benchmarks.gpu.verdict FOLDER`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu import goals, results
from benchmarks.gpu.goals import GOALS, Results
from benchmarks.ops.report import table

KERNELS = {"weights": "matmul", "keys and values": "attention"}  # in the names of kernels


def markdown(folder: Path) -> str:
    """Returns the verdict as Markdown. Everything that the run did not reach is listed."""
    found = results.read(folder)
    said = "\n".join(f"1. {text}" for text in advice(found))
    return "\n\n".join(["# Verdict", *_right(found), *_fast(found), "## Next", said]) + "\n"


def _right(found: Results) -> Iterator[str]:
    yield "## Right?"
    parity = [line for line in found.get("parity", ()) if "right" in line]
    wrong = [line for line in parity if not line["right"]]
    said = f"Ops: {len(parity) - len(wrong)} of {len(parity)} cases right." if parity else "Ops: not reached."
    yield "\n".join([said, *(f"- WRONG {_case(line)}" for line in wrong)])
    modes = found.get("tokens", ())
    lines = [f"- {'right' if line['right'] else 'DIFFERENT'}, {line['mode']}: {_tokens(line)}" for line in modes]
    yield "\n".join(["Tokens of the bundled model beside a CPU's:" if lines else "Tokens: not reached.", *lines])
    stages = [(name, results.outcome(lines)) for name, lines in found.items()]
    rows = ((name, ended["outcome"], _seconds(ended), ended.get("why", "")) for name, ended in stages if ended)
    yield table(("stage", "outcome", "s", "why"), rows)


def _case(line: Mapping[str, Any]) -> str:
    why = line.get("failed") or f"error {line['error']:.2g}, bound {line['bound']:.2g}"
    return f"{line['op']}, {line['dtype']}, {line['label']}: {why}"


def _tokens(line: Mapping[str, Any]) -> str:
    first = next(iter(line["differences"]), None)
    where = f"; first: {first}" if first and not line["right"] else ""
    return f"{line['equal']} of {line['answers']} answers equal, {line['ties']} tied{where}"


def _seconds(ended: Mapping[str, Any]) -> str:
    return f"{ended['seconds']:.0f}" if "seconds" in ended else ""


def _fast(found: Results) -> Iterator[str]:
    yield "## Fast?"
    bandwidth = goals.read_bandwidth(found)
    if bandwidth:
        yield f"The device reads {bandwidth / 1e12:.2f} TB/s; shares of a step and of its kernels are of that."
        rows = (_step(case, bandwidth) for case in goals.decodes(found))
        yield table(("decode step", "tokens/s", "share", *(f"{name} in kernels" for name in KERNELS)), rows)
    known = goals.measured(found)
    rows = (
        (goal.name, f"{reached:.2f}", f"{goal.least:.2f}", _gap(goal.gap(reached))) for goal, reached in known.items()
    )
    if known:
        yield table(("goal", "reached", "wanted", "missing"), rows)
    unknown = [goal.name for goal in GOALS if goal not in known]
    yield f"Not measured: {'; '.join(unknown) or 'nothing'}."


def _gap(gap: float) -> str:
    return f"{100 * gap:.0f} %" if gap > 0 else "reached"


def _step(case: Mapping[str, Any], bandwidth: float) -> tuple[str, ...]:
    """Shares of the bandwidth: of a decode step, of its matmuls and of its attention kernels."""
    label = f"{case['quantization']}, batch {case['batch']}, context {case['context']}"
    moved = {"weights": case["weight_bytes"], "keys and values": case["kv_bytes"]}
    cells = []
    for what, part in KERNELS.items():
        spent = sum(row["end_to_end_us_per_step"] for row in case["launches"] if part in row["name"])
        cells.append(f"{100 * moved[what] / (1e-6 * spent) / bandwidth:.0f} %" if spent else "no trace")
    share = f"{100 * case['bytes_per_second'] / bandwidth:.0f} %"
    return (label, f"{case['tokens_per_second']:.1f}", share, *cells)


def advice(found: Results) -> list[str]:
    """Next steps: crashes, then wrong numbers, then the largest gap."""
    said = []
    ended = {name: results.outcome(lines) for name, lines in found.items()}
    failed = [name for name, line in ended.items() if line.get("outcome") == "failed"]
    wrong = sorted({line["op"] for line in found.get("parity", ()) if line.get("right") is False})
    if wrong:
        said.append(f"Repair {', '.join(wrong)}: wrong alone, at a known shape (compute-sanitizer on `parity` first).")
    modes = {line["mode"]: line["right"] for line in found.get("tokens", ())}
    if modes.get("as it is") is False and not wrong:
        cured = [mode for mode, right in modes.items() if right]
        said.append(
            f"Tokens differ as it is, and not with {' or '.join(cured)}: that is where to look."
            if cured
            else "Tokens differ in every mode though every op is right: look at layers, sampling and the runtime."
        )
    if failed:
        said.append(f"Read in log.txt why these failed: {', '.join(failed)}.")
    cut = [name for name, line in ended.items() if line.get("outcome") in ("cut short", "skipped")]
    if cut:
        said.append(f"Run again for what was not finished: --stages {' '.join(map(repr, cut))}.")
    known = goals.measured(found)
    worst = next(iter(known), None)
    if worst is not None and (gap := worst.gap(known[worst])) > 0:
        said.append(f"The largest gap is {100 * gap:.0f} %, {worst.name}: read its kernels' trace and profile.")
    return said or [f"Nothing failed and nothing differs; of {len(GOALS)} goals {len(known)} were measured, and met."]


if __name__ == "__main__":
    print(markdown(Path(sys.argv[1])), end="")
