"""Measured limits of the device: bandwidth of a read and of a copy, operations per second of a large matmul."""

from __future__ import annotations

from benchmarks.gpu import results, stage
from fastllama.bench.ceilings import ceilings


def main() -> int:
    """Measure, add the line to the results, and print it."""
    options = stage.options(__doc__)
    reached = ceilings(stage.device(options.dry), toy=options.dry)
    results.append(options.results, stage="ceilings", **reached)
    print({name: value for name, value in reached.items() if name != "seconds"}, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
