"""Facts about the machine: versions, the GPU, Triton's checksum, and missing packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import triton

from benchmarks.gpu import results, stage
from benchmarks.gpu.plan import TESTS
from benchmarks.ops.libraries import libraries
from fastllama.bench.environment import environment
from tools.gpu_cache import fingerprint


def main() -> int:
    """Add the line to the results, and print it."""
    options = stage.options(__doc__)
    facts = {
        "environment": environment(),
        "libtriton_sha256": fingerprint(Path(triton.__file__).parent),
        "missing": [name for name in (*TESTS, "xdist", "transformers") if importlib.util.find_spec(name) is None],
        "libraries": libraries(),
    }
    results.append(options.results, stage="facts", **facts)
    for name, value in facts.items():
        print(f"{name}: {value}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
