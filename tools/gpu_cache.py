"""Fills Triton's cache for a GPU machine without a GPU: an archive of compiled kernels and launchers.

python -m tools.gpu_cache make [--out ARCHIVE]                # runs the plan of `make gpu` on the fake GPU
python -m tools.gpu_cache install ARCHIVE FOLDER [--jobs N]   # there: compiles in parallel what does not fit

The cache key of a kernel covers Triton's own files, the source, the specialisation and the target, but no path, driver
or GPU. `install` prints one JSON object: kernels (wanted), hits, compiled, failed, seconds, same_triton.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import io
import json
import multiprocessing
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.gpu import results
from benchmarks.gpu.plan import plan
from tools.fakegpu import log
from tools.fakegpu.environment import GPU_MACHINE, ROOT, Environment
from tools.fakegpu.parts import GPU_PLAN

# Stages whose kernels are compiled ahead: not peers and tuning, which have many kernels and run last.
LEFT_OUT = ("facts", "ceilings", "ops", "tuning", "profile", "decode, peers")
CONTENTS = "contents.json"
GROUP = "__grp__"  # suffix of Triton's index files, which list a kernel's other files by absolute path
KEPT = (".cubin", ".json", ".so")  # a kernel's other files are intermediate representations


def pack(folder: Path, specialisations: Iterable[str], triton: str, out: Path) -> int:
    """Write the archive of a cache folder; returns the number of kernels. triton: of `fingerprint`."""
    contents = {"triton": triton, "specialisations": sorted(set(specialisations))}
    text = json.dumps(contents).encode()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out, "w:xz") as archive:
        about = tarfile.TarInfo(CONTENTS)
        about.size = len(text)
        archive.addfile(about, io.BytesIO(text))
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix in KEPT:
                archive.add(path, str(path.relative_to(folder)))
    return len(contents["specialisations"])


def unpack(archive: Path, folder: Path) -> dict[str, Any]:
    """Put an archive's files where Triton looks for them; returns its contents."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    for path in folder.rglob(f"{GROUP}*.json"):
        group = json.loads(path.read_text(encoding="utf-8"))
        moved = {name: str(path.parent / name) for name in group["child_paths"]}
        path.write_text(json.dumps({"child_paths": moved}), encoding="utf-8")
    contents = folder / CONTENTS
    found = dict(json.loads(contents.read_text(encoding="utf-8")))
    contents.unlink()
    return found


def install(archive: Path, folder: Path, jobs: int) -> dict[str, Any]:
    """Unpack, then compile the missing kernels for this machine's GPU."""
    import triton

    start = time.monotonic()
    contents = unpack(archive, folder)
    wanted = contents["specialisations"]
    context = multiprocessing.get_context("spawn")  # a forked child could not use CUDA
    with ProcessPoolExecutor(max(min(jobs, len(wanted)), 1), context, initializer=_use, initargs=(folder,)) as pool:
        outcomes = list(pool.map(_compiled, wanted, chunksize=4))
    failed = sorted({outcome for outcome in outcomes if isinstance(outcome, str)})
    return {
        "kernels": len(wanted),
        "hits": outcomes.count(True),
        "compiled": outcomes.count(False),
        "failed": failed,
        "seconds": round(time.monotonic() - start, 1),
        "same_triton": contents["triton"] == fingerprint(Path(triton.__file__).parent),
    }


def fingerprint(triton: Path) -> str:
    """Checksum of an installed Triton's shared library, which with its version decides whether a cache fits."""
    (library,) = (triton / "_C").glob("libtriton*.so")
    return hashlib.sha256(library.read_bytes()).hexdigest()


def _use(folder: Path) -> None:
    from triton import knobs

    knobs.cache.dir = str(folder)


def _compiled(specialisation: str) -> bool | str:
    """Ensure that the cache holds a kernel and its launcher; returns whether the kernel was there, or the error."""
    import triton
    from triton.compiler import ASTSource
    from triton.runtime import driver

    module, name, signature, constants, attributes, options = ast.literal_eval(specialisation)
    hits = []
    triton.knobs.compilation.listener = lambda **found: hits.append(found["cache_hit"])
    try:
        kernel = getattr(importlib.import_module(module), name)
        source = ASTSource(kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=driver.active.get_current_target(), options=options)
        driver.active.launcher_cls(compiled.src, compiled.metadata)
    except Exception as error:  # the other kernels are still compiled
        return f"{name}: {type(error).__name__}: {error}"[:300]
    return bool(hits[-1])


def make(environment: Environment, out: Path, commands: Sequence[Sequence[str]]) -> int:
    """Fill an archive by running commands on the fake GPU; returns the number of kernels."""
    folder = out.parent / "gpu-cache"
    shutil.rmtree(folder, ignore_errors=True)
    environment.set_up()
    for command in commands:
        start = time.monotonic()
        status = subprocess.run(
            environment.command(list(command), folder / "log", folder / "triton"), cwd=ROOT
        ).returncode
        print(f"{' '.join(command)}: status {status}, {time.monotonic() - start:.0f} s", flush=True)
    triton = fingerprint(environment.packages / "triton")
    return pack(folder / "triton", log.read(folder / "log").compilations, triton, out)


def main() -> int:
    """See above."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_cache", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="do", required=True)
    making = commands.add_parser("make")
    making.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-cache.tar.xz")
    installing = commands.add_parser("install")
    installing.add_argument("archive", type=Path)
    installing.add_argument("folder", type=Path)
    installing.add_argument("--jobs", type=int, default=multiprocessing.cpu_count())
    installing.add_argument("--results", type=Path, help="results of `make gpu`, to which it adds its own")
    options = parser.parse_args()
    if options.do == "install":
        found = install(options.archive, options.folder, options.jobs)
        print(json.dumps(found))
        if options.results is not None:
            results.append(options.results, stage="cache", **found)
        return 0
    stages = [stage.name for stage in plan(options.out, cache=None, workers=2, dry=False) if stage.name not in LEFT_OUT]
    kernels = make(GPU_MACHINE, options.out, [[*GPU_PLAN, "--minutes", "60", "--stages", *stages]])
    print(f"{options.out}: {kernels} kernels, {options.out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
