"""Tune launch configurations for this GPU by timing; writes the fastest to the user's cache folder.

python -m benchmarks.ops.tune [--families norm ...] [--minutes 10] [--most 24] [--dtype bfloat16] [--out FOLDER] [--dry]

Only the candidates nearest to the heuristic's launch are timed: each takes up to a second to compile, and a matmul has
a thousand. They run at Llama 2's shapes, in turns with the heuristic's, in CUDA graphs over inputs that miss the cache.
A candidate is written if it beats the heuristic by more than 2 %: less is noise. A launch that must not depend on the
number of rows (norm, sample) is judged by all row counts together. The next process reads the result; `--out` writes
elsewhere, to fastllama/kernels/configs/<gpu> for a configuration to ship.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from fastllama.arithmetic import power_of_2
from fastllama.bench import timing
from fastllama.bench.environment import environment
from fastllama.bench.ops import comparison
from fastllama.bench.ops.formulas import Function
from fastllama.bench.ops.judge import judged
from fastllama.catalogue.llama_calls import LlamaCall, llama_calls, toy_calls
from fastllama.catalogue.maker import Arguments
from fastllama.kernels.launch import heuristics, tuned, tuning
from fastllama.kernels.launch.device import Device, device_info

OPS = {
    "norm": "add_rms_norm",
    "rope": "rope_and_write_kv",
    "swiglu": "silu_mul",
    "sample": "sample",
    "adjust": "adjust_logits",
    "prefill": "attention_prefill",
    "decode": "attention_decode",
    "matmul": "matmul",
    "int4": "matmul_int4",
    "int8": "matmul_int8",
    "w8a8": "matmul_w8a8",
}
VALUES = {
    "num_warps": (1, 2, 4, 8, 16, 32),
    "heads": (1, 2, 4, 8, 16, 32),
    "block": tuple(2**n for n in range(7, 15)),
    "rows": (64, 128),
    "columns": (64, 128),
    "keys": (32, 64, 128),
    "split": (256, 512, 1024),
    "stages": (1, 2, 3, 4),
    "features": (32, 64, 128),
    "size": (64, 128, 256),
    "splits": (1, 2, 4, 8, 16),
}
LEAST_ELEMENTS, MOST_ELEMENTS = 2, 64  # a thread's share: with less most threads idle, with more registers spill
WORTH_IT = 1.02
Asked = tuple[int, ...]  # the values of a family's shape


def candidates(family: str, shape: tuned.Shape, device: Device) -> Iterator[Any]:
    """The launches to time: the heuristic's, then its nearest neighbours, by factors of two in each parameter."""
    kind = tuning.FAMILIES[family]
    first = kind.heuristic(device, **shape)
    yield first
    names = [each.name for each in fields(kind.launch)]
    found = [kind.launch(*values) for values in itertools.product(*(VALUES[name] for name in names))]
    for launch in sorted(found, key=partial(_distance, first)):
        threads = launch.num_warps * device.warp_size
        fits = LEAST_ELEMENTS * threads <= _share(launch, shape) <= MOST_ELEMENTS * threads
        if launch != first and threads <= heuristics.MAX_THREADS and fits:
            yield launch


def _distance(first: Any, launch: Any) -> float:
    pairs = zip(asdict(first).values(), asdict(launch).values(), strict=True)
    return sum(abs(math.log2(value / origin)) for origin, value in pairs)


def _share(launch: Any, shape: tuned.Shape) -> int:
    """Elements that one program holds."""
    if isinstance(launch, heuristics.RopeLaunch):
        return launch.heads * shape["head_dim"]
    if isinstance(launch, heuristics.PrefillLaunch):
        return launch.rows * shape["head_dim"]
    if isinstance(launch, heuristics.DecodeLaunch):
        return max(power_of_2(shape["queries"]), 16) * shape["head_dim"]
    if isinstance(launch, heuristics.MatmulLaunch):
        return launch.features * 16
    if isinstance(launch, heuristics.W8A8Launch):
        return launch.rows * 128
    if isinstance(launch, heuristics.QuantizedMatmulLaunch):
        return 64 * 64
    return shape["size"] if isinstance(launch, heuristics.NormLaunch) else int(launch.block)


def asked(family: str, case: LlamaCall, device: torch.device) -> Asked | None:
    """The shape that a case's launcher looks up; None if it looks up none: matmuls of many rows are torch's."""
    seen: list[Asked] = []
    inputs = case.make(device, seed=0)  # before: sizing the workspace may look up a launch, too

    def remember(name: str, device: torch.device, *values: int) -> Any:
        if name == family:
            seen.append(values)
        kind = tuning.FAMILIES[name]
        return kind.heuristic(device_info(device), **dict(zip(kind.shape, values, strict=True)))

    with mock.patch.object(tuning, "_launch", remember), comparison.running(case.op, device) as run:
        run(inputs)
    return seen[0] if seen else None


@contextmanager
def launching(case: LlamaCall, device: torch.device, launch: Any) -> Iterator[Function]:
    """Runs the op of a case with a given launch."""
    with mock.patch.object(tuning, "_launch", partial(_given, launch)), comparison.running(case.op, device) as run:
        yield run


def _given(launch: Any, family: str, device: torch.device, *values: int) -> Any:
    """Replaces the lookup of a launch."""
    return launch


def timed(case: LlamaCall, device: torch.device, launches: list[Any], rounds: int) -> list[float | None]:
    """Median seconds of a case with each launch; None if it cannot run."""
    sets = comparison.input_sets(case, device)
    if any("workspace" in inputs for inputs in sets):
        # Zeros, and large enough for any launch: otherwise the timing would include the allocation.
        dtype = {"matmul_w8a8": torch.int32, "sample": torch.int64}.get(case.op, torch.float32)
        scratch = torch.zeros(1 << (26 if device.type == "cuda" else 20), dtype=dtype, device=device)
        sets = [{**inputs, "workspace": scratch} for inputs in sets]
    samplers: dict[str, timing.Sampler] = {}
    for number, launch in enumerate(launches):
        call = timing.rotating(partial(_run, case, device, launch), sets)
        try:
            call()
            calls = max(comparison.GRAPH_CALLS, len(sets))
            samplers[str(number)] = timing.wall(call) if device.type == "cpu" else timing.graph(call, calls)
        except Exception as failure:  # for example too much shared memory: not a legal launch
            print(f"  {launch}: {type(failure).__name__}: {str(failure)[:99]}", flush=True)
    taken = timing.in_turns(samplers, rounds)
    return [statistics.median(taken[str(n)]) if str(n) in taken else None for n in range(len(launches))]


def _run(case: LlamaCall, device: torch.device, launch: Any, inputs: Arguments) -> None:
    with launching(case, device, launch) as run:
        run(inputs)


def best(times: dict[Any, list[float | None]], heuristic: Any) -> tuned.TunedLaunch | None:
    """The launch with the lowest geometric mean over the cases, in microseconds; None if the heuristic's is as good."""
    means = {
        launch: statistics.geometric_mean([1e6 * each for each in seconds if each is not None])
        for launch, seconds in times.items()
        if None not in seconds
    }
    if heuristic not in means:
        raise RuntimeError(f"the heuristic's {heuristic} cannot run here")
    launch = min(means, key=lambda each: means[each])
    if means[heuristic] < WORTH_IT * means[launch]:
        return None
    return tuned.TunedLaunch({}, launch, round(means[launch], 3), round(means[heuristic], 3))


def tune(
    family: str, found: list[LlamaCall], device: torch.device, rounds: int, deadline: float, most: int
) -> list[tuned.TunedLaunch]:
    """Entries for the shapes of the cases, as far as the time allows. most: number of candidates."""
    kind, groups = tuning.FAMILIES[family], defaultdict(list)
    for case in found:
        if (values := asked(family, case, device)) is not None:
            groups[values].append(case)
    entries = []
    for values, group in groups.items():
        if time.monotonic() > deadline:
            print(f"{family}: no time for {values}", flush=True)
            continue
        shape = dict(zip(kind.shape, values, strict=True))
        launches = list(itertools.islice(candidates(family, shape, device_info(device)), most))
        columns = [timed(case, device, launches, rounds) for case in group]
        entry = best(dict(zip(launches, map(list, zip(*columns, strict=True)), strict=True)), launches[0])
        print(f"{family} {shape}: {'the heuristic will do' if entry is None else asdict(entry)}", flush=True)
        if entry is not None:
            for case in group:
                with launching(case, device, entry.launch) as run:
                    error, bound = judged(case, run, device)
                if error > bound:
                    raise RuntimeError(f"{case.op}, {case.label}: wrong with {entry.launch}: {error:.2g} > {bound:.2g}")
            entries.append(tuned.TunedLaunch(shape, entry.launch, entry.microseconds, entry.heuristic_microseconds))
    return entries


def main() -> None:
    """Tune the families, most valuable first, and write a file for each with a faster launch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=tuple(OPS), default=list(OPS))
    parser.add_argument("--minutes", type=float, default=10.0, help="time budget")
    parser.add_argument("--most", type=int, default=24, help="candidates per shape, including the heuristic's")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--out", type=Path, help="folder of the files; by default the user's cache")
    parser.add_argument("--dry", action="store_true", help="time two candidates of a toy shape on a CPU; needs --out")
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --dry walks the plan without one")
    if options.dry and options.out is None:
        parser.error("--dry needs --out: its times mean nothing and must not be found")
    device = torch.device("cpu") if options.dry else torch.device("cuda", 0)
    facts, seen = device_info(device), environment()
    folder = options.out or tuning.user_folder(facts)
    provenance = {name: str(seen[name]) for name in ("fastllama", "commit", "torch", "triton", "device")}
    provenance["date"] = datetime.now(timezone.utc).date().isoformat()
    provenance["command"] = f"python -m benchmarks.ops.tune --dtype {options.dtype}"
    deadline = time.monotonic() + 60 * options.minutes
    source, rounds, most = (toy_calls, 1, 2) if options.dry else (llama_calls, 15, options.most)
    for family in options.families:
        found = list(source(getattr(torch, options.dtype), (OPS[family],)))
        with torch.inference_mode(), comparison.interpreted(options.dry):
            entries = tune(family, found, device, rounds, deadline, most)
        if entries:
            path = folder / f"{family}.json"
            tuned.write(path, family, facts.name, provenance, entries)
            print(f"wrote {path}", flush=True)


if __name__ == "__main__":
    main()
