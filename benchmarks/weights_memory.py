"""Peak memory while loading, and memory held afterwards: this project, transformers, and both over the same weights.

python -m benchmarks.weights_memory [--shape 1.1b] [--shard-mb 500] [--cases NAME ...] [--output FILE]

Random bf16 weights, written to a temporary folder in shards, and once more in 4 bits; each case loads in its own
process. held: bytes of all tensors of the model, each storage once. anonymous: peak of allocated memory beyond that at
the start. resident: the same with mapped file pages, which the system can drop at any time. Linux only:
/proc/self/status.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastllama
from fastllama.bench.environment import environment
from fastllama.bench.files import output_file, write_record
from fastllama.bench.models import SHAPES, random_model, shape

MB = 1 << 20
COLUMNS = "held", "anonymous", "resident"


def resident() -> tuple[int, int]:
    """Returns the process's bytes in memory: allocated, and including mapped files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) << 10, int(lines["VmRSS"].split()[0]) << 10


class Peak:
    """Samples `resident` twice a millisecond; keeps the peak beyond the first sample."""

    def __init__(self) -> None:
        self._before, self._most, self._over = resident(), resident(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(5e-4):
            self._look()

    def _look(self) -> None:
        anonymous, whole = resident()
        self._most = max(self._most[0], anonymous), max(self._most[1], whole)

    def end(self) -> tuple[int, int]:
        """Stop sampling and return the peaks."""
        self._look()
        self._over.set()
        self._thread.join()
        return self._most[0] - self._before[0], self._most[1] - self._before[1]


def held(modules: Iterable[nn.Module]) -> int:
    """Returns the bytes of all tensors of some modules, each storage once."""
    spans = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)
        for module in modules
        for tensor in (*module.parameters(), *module.buffers())
    )
    total, reached = 0, 0
    for start, end in spans:
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total


def ours(folder: Path, **options: Any) -> list[nn.Module]:
    """Load by load_model."""
    return [fastllama.load_model(folder, progress=False, **options)]


def theirs(folder: Path, **options: Any) -> list[nn.Module]:
    """Load by transformers."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return [transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16", **options)]


def rounding(folder: Path) -> list[nn.Module]:
    """Load by transformers, quantized to int4 by FastLlamaConfig."""
    return theirs(folder, quantization_config=fastllama.FastLlamaConfig("int4"))


def both(folder: Path) -> list[nn.Module]:
    """Load by transformers, then make this project's model over the same memory."""
    (model,) = theirs(folder)
    return [model, fastllama.from_transformers(model)]


CASES: dict[str, tuple[str, Callable[[Path], list[nn.Module]]]] = {
    "load_model": ("bf16", ours),
    "load_model, quantization='int4'": ("bf16", lambda folder: ours(folder, quantization="int4")),
    "load_model of 4 bits": ("int4", ours),
    "transformers": ("bf16", theirs),
    "transformers, FastLlamaConfig('int4')": ("bf16", rounding),
    "transformers, then from_transformers": ("bf16", both),
}


def measure(case: str, folders: Path) -> dict[str, int]:
    """Measures a case in this process, after the bundled model has loaded all kernels and libraries."""
    which, load = CASES[case]
    for _ in range(2):
        modules = load(folders / f"small-{which}")
        del modules
        gc.collect()
    peak = Peak()
    modules = load(folders / which)
    anonymous, whole = peak.end()
    return dict(zip(COLUMNS, (held(modules), anonymous, whole), strict=True))


def write(name: str, folder: Path, shard: int) -> None:
    """Write a shape's random weights, in bf16 and in 4 bits."""
    torch.manual_seed(0)
    for prefix, config in (("small-", shape("tiny", 64)), ("", shape(name, 64))):
        model = random_model(config, "none", torch.bfloat16, torch.device("cpu"))
        fastllama.save_model(model, folder / f"{prefix}bf16", max_shard_size=shard)
        del model
        packed = fastllama.load_model(folder / f"{prefix}bf16", quantization="int4", progress=False)
        fastllama.save_model(packed, folder / f"{prefix}int4", max_shard_size=shard)


def main() -> None:
    """Write the weights, take the measurements, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    parser.add_argument("--shard-mb", type=int, default=500)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--output", type=output_file, help="where to write conditions and figures as JSON")
    parser.add_argument("--measure", nargs=2, metavar=("CASE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure[0], Path(options.measure[1]))))
        return
    found: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write(options.shape, Path(folder), options.shard_mb * MB)
        print(f"{'MB':40}" + "".join(f"{name:>12}" for name in COLUMNS))
        for case in options.cases:
            command = [sys.executable, "-m", "benchmarks.weights_memory", "--measure", case, folder]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[case] = json.loads(done.stdout.splitlines()[-1])
            print(f"{case:40}" + "".join(f"{found[case][name] / MB:12.0f}" for name in COLUMNS), flush=True)
    if options.output:
        conditions = {"shape": options.shape, "shard_mb": options.shard_mb, "dtype": "bfloat16"}
        record = {"benchmark": "weights_memory", "conditions": conditions, "environment": environment()}
        write_record(options.output, record | {"bytes": found})


if __name__ == "__main__":
    main()
