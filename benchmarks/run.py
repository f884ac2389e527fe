"""All that a machine with a GPU should say, in one folder: tests, launch costs, decode steps, every op and its peers.

python -m benchmarks.run --out FOLDER [--minutes 8] [--ops rms_norm ...] [--dtype bfloat16] [--dry]

The most valuable comes first and the file is written after every case, so that a run cut short still tells something.
--dry walks the same plan at toy sizes, on a CPU with TRITON_INTERPRET=1: its times mean nothing.
Writes bench.json (environment, conditions, raw samples), report.md, launch_overhead.json, block.json, decode.json, and
what each step printed: tests.txt and so on.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import micro, report
from benchmarks.peers import libraries
from benchmarks.registry import OPS, Case, cases, toy_cases
from fastllama.bench.ceilings import ceilings
from fastllama.bench.environment import environment, gpu, write_record

ROOT = Path(__file__).parents[1]
SHARE_OF_TESTS = 0.5  # of the time, at most
SHARE_OF_BLOCKS = 0.2
SHARE_OF_DECODE = 0.15
DECODE = "--shape 7b --quantize none int4 --batch 1 32 --context 512 4096"
DECODE_DRY = "--shape tiny --device cpu --batch 1 2 --context 80 --tokens 4"
NEEDED_BY_RUNTIME = ("numpy", "tqdm", "safetensors", "sentencepiece")
NEEDED_BY_TESTS = ("pytest", "hypothesis", *NEEDED_BY_RUNTIME)
NO_TEST_RAN = 5  # pytest's exit status


def run_tests(out: Path, seconds: float) -> dict[str, Any]:
    """Run the GPU tier; its output is tests.txt."""
    if missing := _missing(NEEDED_BY_TESTS):
        return {"outcome": missing, "status": None}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu"]
    status = _step(command, out / "tests.txt", seconds)
    meaning = {0: "passed", NO_TEST_RAN: "none, for lack of a GPU", None: f"cut short after {seconds:.0f} s"}
    return {"outcome": meaning.get(status, f"FAILED with status {status}"), "status": status}


def run_launch_overhead(out: Path, rounds: int) -> dict[str, Any]:
    """Run benchmarks.launch_overhead in a process where kernels are compiled, not interpreted."""
    path = out / "launch_overhead.json"
    command = [sys.executable, "-m", "benchmarks.launch_overhead", "--rounds", str(rounds), "--output", str(path)]
    status = _step(["env", "-u", "TRITON_INTERPRET", *command], out / "launch_overhead.txt", 120)
    if status != 0:
        return {"ops": {}, "failed": f"status {status}, see launch_overhead.txt"}
    return dict(json.loads(path.read_text(encoding="utf-8")))


def run_block(out: Path, seconds: float, dry: bool) -> dict[str, Any]:
    """Run benchmarks.block in a process of its own, whose memory ends with it."""
    return _recorded("block", ["benchmarks.block", *(["--dry"] if dry else [])], out, seconds)


def run_decode(out: Path, seconds: float, dry: bool) -> dict[str, Any]:
    """Run `fastllama bench decode` in a process of its own."""
    if missing := _missing(NEEDED_BY_RUNTIME):
        return {"cases": [], "not_run": missing}
    sizes = DECODE_DRY if dry else DECODE
    return _recorded("decode", ["fastllama", "bench", "decode", *sizes.split()], out, seconds)


def _missing(names: tuple[str, ...]) -> str | None:
    """What to say where some packages are not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return f"not run, for lack of {' and '.join(missing)}" if missing else None


def _recorded(name: str, module: list[str], out: Path, seconds: float) -> dict[str, Any]:
    """What a module writes by --output, and how it ended; cut short it has written what it has."""
    path = out / f"{name}.json"
    path.unlink(missing_ok=True)
    status = _step([sys.executable, "-m", *module, "--output", str(path)], out / f"{name}.txt", seconds)
    found = dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {"cases": []}
    if status is None:
        return found | {"cut_short": f"cut short after {seconds:.0f} s"}
    return found if status == 0 else found | {"failed": f"status {status}, see {name}.txt"}


def _step(command: list[str], log: Path, seconds: float) -> int | None:
    """Exit status of a command whose output goes to a file; None where it took longer."""
    with log.open("w", encoding="utf-8") as file:
        try:
            return subprocess.run(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=seconds, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            return None


def plan(dtype: torch.dtype, ops: tuple[str, ...], dry: bool, device: torch.device) -> Iterator[Case]:
    """The cases in order: those of ops with a kernel for the device first."""
    found = list(toy_cases(dtype, ops) if dry else cases(dtype, ops))
    for kernel in (True, False):
        yield from (case for case in found if (micro.implementation(case.op, device).backend != "reference") == kernel)


def main() -> int:
    """Run the plan; 1 where a test, a launch, a block, a decode step or one of our own ops failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=8.0, help="time budget")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--dry", action="store_true", help="walk the plan at toy sizes")
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --dry walks the plan without one")
    start = time.monotonic()
    seconds = 60 * options.minutes
    device = torch.device("cpu") if options.dry else torch.device("cuda", 0)
    dtype = getattr(torch, options.dtype)
    options.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "benchmark": "micro",
        "environment": environment(),
        "libraries": libraries(),
        "conditions": {key: value for key, value in vars(options).items() if key != "out"},
        "tests": run_tests(options.out, SHARE_OF_TESTS * seconds),
        "launch_overhead": run_launch_overhead(options.out, 3 if options.dry else 40),
        "block": run_block(options.out, SHARE_OF_BLOCKS * seconds, options.dry),
        "decode": run_decode(options.out, SHARE_OF_DECODE * seconds, options.dry),
        "ceilings": ceilings(device, toy=options.dry),
        "cases": [],
        "skipped": [],
    }
    print(f"tests: {record['tests']['outcome']}, {time.monotonic() - start:.0f} s", flush=True)
    longest = 0.0
    for case in plan(dtype, tuple(options.ops), options.dry, device):
        began = time.monotonic()
        if began + longest - start > seconds:
            record["skipped"].append(f"{case.op}, {case.label}: no time left")
            continue
        try:
            with micro.interpreted(options.dry):
                record["cases"].append(micro.measure(case, device, rounds=2 if options.dry else micro.ROUNDS))
        except torch.OutOfMemoryError:
            record["skipped"].append(f"{case.op}, {case.label}: does not fit in memory")
        if not options.dry:
            torch.cuda.empty_cache()  # the memory of this case's graphs
        longest = max(longest, time.monotonic() - began)
        record["environment"]["gpu_after"] = gpu()
        write_record(options.out / "bench.json", record)
        print(f"{case.op}, {case.label}: {time.monotonic() - began:.1f} s", flush=True)
    write_record(options.out / "bench.json", record)
    (options.out / "report.md").write_text(report.markdown(record), encoding="utf-8")
    print((options.out / "report.md").read_text(encoding="utf-8"))
    broken = [case["op"] for case in record["cases"] if "failed" in case["contenders"][micro.OURS]]
    failed = any("failed" in record[step] for step in ("launch_overhead", "block", "decode"))
    return int(bool(broken) or failed or record["tests"]["status"] not in (0, NO_TEST_RAN, None))


if __name__ == "__main__":
    sys.exit(main())
