"""The stages of `make gpu`, most valuable first: wrong numbers before slow ones, one stream before 64.

Each is a process with its own time limit. `least` and `most` are seconds for a run of eight minutes; longer runs
stretch `most`. Time that a stage does not use goes to the stages after it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu.results import FILE

# Compiled kernels, some 1000 files: kept apart from the results, which are copied off the machine.
INSTALLED = Path(__file__).parents[2] / "build" / "gpu-cache-installed"
MINUTES = 8.0  # for which the limits hold
RUNTIME = ("numpy", "tqdm", "safetensors", "sentencepiece")
TESTS = ("pytest", "hypothesis", *RUNTIME)
SWITCHES = {
    "as it is": {},
    "no graphs": {"FASTLLAMA_GRAPHS": "0"},
    "no overlap of launches": {"FASTLLAMA_PDL": "0"},
    "no steps ahead": {"FASTLLAMA_AHEAD": "0"},
    "torch for every op": {"FASTLLAMA_BACKEND": "reference", "FASTLLAMA_GRAPHS": "0"},  # it reads lengths on the host
}


@dataclass(frozen=True)
class Stage:
    """One process.

    argv: arguments of `python`. variables: environment. least: seconds below which it is not started; most: seconds
    after which it is ended. needs: packages without which it cannot run. writes: whether it takes `--output`, a file
    of JSON; the others add lines to the results themselves, or only print.
    """

    name: str
    argv: tuple[str, ...]
    least: int
    most: int
    variables: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    writes: bool = False

    def limit(self, minutes: float, left: float) -> float:
        """Seconds it may take, given the minutes of the run and the seconds left; 0 if it is not started."""
        return 0.0 if left < self.least else min(self.most * max(minutes / MINUTES, 1.0), left)


def plan(out: Path, *, cache: Path | None, workers: int, dry: bool) -> Iterator[Stage]:
    """Returns the stages in order. workers: processes of pytest and of compilers. dry: toy sizes, on a CPU."""
    lines = ("--results", str(out / FILE))
    toy = ("--dry",) if dry else ()

    def own(name: str, module: str, least: int, most: int, *argv: str, **options: object) -> Stage:
        argv = ("-m", f"benchmarks.gpu.{module}", *lines, *argv, *toy)
        return Stage(name, argv, least, most, **options)  # type: ignore[arg-type]

    yield own("facts", "facts", 5, 45)
    if cache is not None:
        install = ("-m", "tools.gpu_cache", "install", str(cache), str(INSTALLED))
        yield Stage("cache", (*install, "--jobs", str(workers), *lines), 5, 120)
    yield own("parity", "parity", 10, 90)
    for mode, variables in SWITCHES.items():
        yield own(f"tokens, {mode}", "tokens", 5, 40, "--mode", mode, variables=variables, needs=RUNTIME)
    device = ("--device", "cpu" if dry else "cuda")
    yield Stage("verify", ("-m", "fastllama", "verify", "--quiet", *device), 5, 60, needs=RUNTIME)
    yield own("ceilings", "ceilings", 5, 20)
    for context in (512, 4096):
        shape = ("--shape", "7b", "--quantize", "none", "int8", "int4", "--batch", "1", "--context", str(context))
        if dry:
            shape = ("--shape", "tiny", "--batch", "1", "--context", str(80 + context // 512), "--tokens", "4")
        decode = ("-m", "fastllama", "bench", "decode", *shape, *device, "--no-peers")
        yield Stage(f"decode at {context}", decode, 20, 90, needs=RUNTIME, writes=True)
    for name, variables in (("block", {}), ("block, no overlap", SWITCHES["no overlap of launches"])):
        yield Stage(name, ("-m", "benchmarks.ops.block", *toy), 20, 75, variables, writes=True)
    parallel = ("-n", str(min(workers, 8))) if importlib.util.find_spec("xdist") and not dry else ()
    for name, *argv in (
        ("runtime", "tests/gpu/test_runtime.py", "tests/gpu/test_warm_up.py"),
        ("ops", "tests/gpu/test_ops.py", "tests/gpu/test_values.py", "-k", "not llamas_shapes", *parallel),
        ("patch", "tests/gpu/test_patch.py"),
        ("adapters", "tests/integrations/flash_attn", "tests/integrations/flashinfer", *parallel),
        ("shapes", "tests/gpu/test_ops.py", "-k", "llamas_shapes and bfloat16", *parallel),
    ):
        pytest = ("-m", "pytest", "-v", "--tb=short", "-m", "gpu", "-p", "no:cacheprovider")
        needs = (*TESTS, "transformers") if name == "patch" else TESTS
        yield Stage(f"tests of {name}", (*pytest, *argv), 15, 90, needs=needs)
    patch = ("-m", "benchmarks.transformers_patch", *device, *(("--size", "toy", "--rounds", "2") if dry else ()))
    yield Stage("patched transformers", patch, 15, 60, needs=(*RUNTIME, "transformers"), writes=True)
    rounds = ("--rounds", "3" if dry else "40")
    compiled = {"TRITON_INTERPRET": "0"}  # in a dry run, too
    yield Stage("launches", ("-m", "benchmarks.launch_overhead", *rounds), 10, 60, compiled, writes=True)
    yield own("ops", "ops", 15, 480)
    found = ("--out", str(out / "tuned"), "--minutes", "4", "--most", "12")
    yield Stage("tuning", ("-m", "benchmarks.ops.tune", "--families", "matmul", "int4", *found, *toy), 60, 240)
    yield own("profile", "profile", 30, 60)
    if not dry:
        peers = ("--shape", "7b", "--batch", "1", "--context", "512")
        yield Stage(
            "decode, peers", ("-m", "fastllama", "bench", "decode", *peers), 90, 180, needs=RUNTIME, writes=True
        )
