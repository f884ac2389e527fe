"""Committed results, and the rates and ratios that pictures and the README quote. Loads no matplotlib."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
Record = dict[str, Any]

# Of `benchmarks.cpu.decode`: our format, and the llama.cpp format that rounds weights about as much.
PEERS = {"fastllama bf12": "BF16", "fastllama": "BF16", "fastllama int8": "Q8_0", "fastllama int4": "Q4_0"}
DECODE = "cpu_decode_bf16.json"
DECODE_AVX512 = "cpu_decode_bf16_avx512.json"
# 25 rounds of our formats alone, and 7 of llama.cpp's, for the bundled model's shape.
BUSY = ("cpu_busy_1.1b.json", "cpu_busy_tiny_25_rounds.json", "cpu_busy_tiny.json")


def load(name: str) -> Record:
    """A record below benchmarks/results."""
    record: Record = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return record


def day(record: Record) -> str:
    """The day of a measurement."""
    return str(record["environment"]["date"])


def machine(record: Record) -> str:
    """Processor, vector instructions and threads."""
    found = record["environment"]
    return f"{found['processor']} ({found['cpu_capability']}), {found['threads']} threads"


def decode_rates(record: Record) -> dict[str, dict[str, list[float]]]:
    """Of a `benchmarks.cpu.decode` record: tokens/s of each sample, by phase and contender.

    The first of `tokens` tokens belongs to the prefill. transformers is timed through `generate` and through its bare
    forward pass; "transformers" is the faster of the two in that phase.
    """
    tokens = {"decode": record["conditions"]["tokens"] - 1, "prefill": record["conditions"]["prompt_tokens"]}
    rates = {}
    for phase, count in tokens.items():
        found = {name: [count / sample[phase] for sample in taken] for name, taken in record["samples"].items()}
        both = [found.pop("transformers generate"), found.pop("transformers forward")]
        rates[phase] = found | {"transformers": max(both, key=median)}
    return rates


def thread_gains(record: Record) -> dict[str, dict[int, float]]:
    """Of a `benchmarks.cpu.busy` record: decode speed of the most threads over one, by contender and neighbours."""
    seconds: dict[tuple[str, int, int], list[float]] = defaultdict(list)
    for sample in record["samples"]:
        seconds[sample["contender"], sample["neighbours"], sample["threads"]].append(sample["decode"])
    most = max(threads for _, _, threads in seconds)
    gains: dict[str, dict[int, float]] = defaultdict(dict)
    for (name, neighbours, threads), taken in seconds.items():
        if threads == most:
            gains[name][neighbours] = median(seconds[name, neighbours, 1]) / median(taken)
    return gains


def busy_gains(large: Record, tiny: Record, tiny_peers: Record) -> dict[str, dict[str, dict[int, float]]]:
    """`thread_gains` by model, of the records of BUSY: ours of the run of 25 rounds, llama.cpp's of the one of 7."""
    return {"1.1B": thread_gains(large), "tiny": thread_gains(tiny_peers) | thread_gains(tiny)}


def gain_range(
    gains: dict[str, dict[str, dict[int, float]]], family: str, neighbours: Sequence[int]
) -> tuple[float, float]:
    """Of `busy_gains`, the least and the most of a family's contenders beside so many neighbours."""
    chosen = [
        each[count]
        for model in gains.values()
        for name, each in model.items()
        for count in neighbours
        if name.startswith(family)
    ]
    return min(chosen), max(chosen)


def figures() -> dict[str, float]:
    """The numbers that the README quotes, unrounded, by name: `decode_figures` of DECODE, and busy_*.

    busy_*: decode speed of two threads over one beside two programs that never wait, the least and the most over both
    models and all formats.
    """
    found = decode_figures(load(DECODE))
    for family in ("fastllama", "llama.cpp"):
        least, most = gain_range(busy_gains(*map(load, BUSY)), family, [2])
        found |= {f"busy_{_key(family)}_least": least, f"busy_{_key(family)}_most": most}
    return found


def decode_figures(record: Record) -> dict[str, float]:
    """Of a `benchmarks.cpu.decode` record: medians by name, and *_over_*, times a peer's speed in the same run."""
    found: dict[str, float] = {}
    for phase, rates in decode_rates(record).items():
        medians = {name: median(taken) for name, taken in rates.items()}
        for name, value in medians.items():
            found[f"{phase}_tokens_per_s_{_key(name)}"] = value
        for name, peer in PEERS.items():
            found[f"{phase}_{_key(name)}_over_transformers"] = medians[name] / medians["transformers"]
            found[f"{phase}_{_key(name)}_over_llama_cpp"] = medians[name] / medians[f"llama.cpp {peer}"]
    return found


def _key(name: str) -> str:
    """`fastllama bf12` as fastllama_bf12, `llama.cpp Q8_0` as llama_cpp_q8_0."""
    return name.replace(" ", "_").replace(".", "_").lower()
