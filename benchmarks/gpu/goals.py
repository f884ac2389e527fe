"""Performance goals as numbers, each with the function that measures it from a run's results.

The goals follow the best published figures: 78 % of the bandwidth in bf16 (a megakernel, 1B,
H100), 52 % in int8 and 42 % in int4 (gpt-fast, A100), 2.2 to 2.6 times bf16 for 4-bit matmuls (Marlin, H100).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastllama.bench.ops.report import ALONE, OURS

Results = Mapping[str, Sequence[Mapping[str, Any]]]
FEW_ROWS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Goal:
    """measure: a run's results -> a ratio that should be at least `least`; None if the run did not measure it."""

    name: str
    least: float
    measure: Callable[[Results], float | None]

    def gap(self, reached: float) -> float:
        """The missing share of the goal for a measured ratio; negative if the goal is exceeded."""
        return 1 - reached / self.least


def ceilings(results: Results) -> Mapping[str, Any]:
    """The line of `ceilings`; {} without one."""
    return next((line for line in results.get("ceilings", ()) if "copy_bytes_per_second" in line), {})


def read_bandwidth(results: Results) -> float | None:
    """Bytes per second of the read bandwidth, the ceiling of a decode step."""
    reached = ceilings(results)
    found = reached.get("read_bytes_per_second", reached.get("copy_bytes_per_second"))
    return None if found is None else float(found)


def decodes(results: Results) -> Iterator[Mapping[str, Any]]:
    """This project's cases of every decode stage."""
    for stage, lines in results.items():
        if stage.startswith("decode"):
            for line in lines:
                for case in line.get("record", {}).get("cases", ()):
                    if case["name"] == OURS and "failed" not in case:
                        yield case


def cases(results: Results, op: str) -> Iterator[Mapping[str, Any]]:
    """The cases of an op at the 7B's shapes in which this project's op was timed."""
    for line in results.get("ops", ()):
        case = line.get("case", {})
        if case.get("op") == op and case["model"] == "llama-2-7b" and seconds(case, OURS) is not None:
            yield case


def ours(case: Mapping[str, Any]) -> float | None:
    """This project's time, without the overlap of equal launches, which no step has, if that was measured."""
    return seconds(case, ALONE) or seconds(case, OURS)


def seconds(case: Mapping[str, Any], contender: str) -> float | None:
    """Median seconds of a call in a graph."""
    found = case["contenders"].get(contender, {}).get("graph", {}).get("median")
    return None if found is None else float(found)


def _decode(kind: str) -> Callable[[Results], float | None]:
    def measure(results: Results) -> float | None:
        bandwidth = read_bandwidth(results)
        shares = [
            case["bytes_per_second"] / bandwidth
            for case in decodes(results)
            if bandwidth and (case["quantization"], case["batch"], case["context"]) == (kind, 1, 512)
        ]
        return max(shares, default=None)

    return measure


def _bandwidth(op: str, rows: int | None = None, context: int = 0) -> Callable[[Results], float | None]:
    """The lowest bandwidth share of an op's cases with that many rows, or at least that context."""

    def measure(results: Results) -> float | None:
        ceiling = ceilings(results).get("copy_bytes_per_second") if rows else read_bandwidth(results)
        shares = [
            case["bytes"] / (ours(case) or 1.0) / ceiling
            for case in cases(results, op)
            if ceiling and not case["codes"] and (case["rows"] == rows if rows else case["context"] >= context)
        ]
        return min(shares, default=None)

    return measure


def _beside(op: str, peers: Sequence[str], rows: Sequence[int] = ()) -> Callable[[Results], float | None]:
    """The lowest ratio, over an op's cases, of the fastest peer's time to this project's."""

    def measure(results: Results) -> float | None:
        ratios = []
        for case in cases(results, op):
            theirs = [
                taken
                for name in case["contenders"]
                if any(name.startswith(peer) for peer in peers) and (taken := seconds(case, name)) is not None
            ]
            if theirs and (not rows or case["rows"] in rows):
                ratios.append(min(theirs) / (ours(case) or 1.0))
        return min(ratios, default=None)

    return measure


GOALS = (
    Goal("7B decode, batch 1, bf16: of the bandwidth", 0.85, _decode("none")),
    Goal("7B decode, batch 1, int8: of the bandwidth", 0.75, _decode("int8")),
    Goal("7B decode, batch 1, int4: of the bandwidth", 0.65, _decode("int4")),
    Goal("4-bit matmul, 1 to 16 rows: times bf16", 2.5, _beside("matmul_int4", ("F.linear",), FEW_ROWS)),
    Goal("8-bit matmul, 1 to 256 rows: times bf16", 1.0, _beside("matmul_int8", ("F.linear",), (*FEW_ROWS, 64, 256))),
    Goal("paged decode from 4096 tokens: of the bandwidth", 0.9, _bandwidth("attention_decode", context=4096)),
    Goal("paged decode: times FlashInfer", 1.0, _beside("attention_decode", ("flashinfer",))),
    Goal("causal prefill: times the fastest SDPA", 0.8, _beside("attention_varlen", ("SDPA",))),
    Goal("rms_norm, 8192 rows: of a copy", 0.9, _bandwidth("rms_norm", rows=8192)),
    Goal("add_rms_norm, 8192 rows: of a copy", 0.9, _bandwidth("add_rms_norm", rows=8192)),
    Goal("rope_and_write_kv, 8192 rows: of a copy", 0.9, _bandwidth("rope_and_write_kv", rows=8192)),
    Goal("silu_mul, 8192 rows: of a copy", 0.9, _bandwidth("silu_mul", rows=8192)),
)


def measured(results: Results) -> dict[Goal, float]:
    """The ratio reached for each goal that a run measured, the largest gap first."""
    found = {goal: reached for goal in GOALS if (reached := goal.measure(results)) is not None}
    return dict(sorted(found.items(), key=lambda pair: -pair[0].gap(pair[1])))
