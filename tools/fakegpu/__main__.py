"""The fake GPU from the command line.

python -m tools.fakegpu check [PART ...]   # run all parts, or these, on the fake GPU; print their use of it
python -m tools.fakegpu run COMMAND ...    # any command; `python` is that environment's

Both set up the environment first: --torch and --triton choose the versions. The exit status is 1 if a command failed or
the log holds a violation: an illegal launch, a call that a capture forbids, an allocation or a wait in a replayed step.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from fastllama.testing.shard import Shard
from tools.fakegpu import log
from tools.fakegpu.environment import GPU_MACHINE, ROOT, Environment
from tools.fakegpu.parts import PARTS, PLANTED


def run(environment: Environment, name: str, argv: list[str]) -> bool:
    """Run a command; print its use of the GPU and every violation; return whether there was none."""
    folder = environment.folder / "logs" / name
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    start = time.monotonic()
    status = subprocess.run(environment.command(argv, folder / "log"), cwd=ROOT, check=False).returncode
    found = log.read(folder / "log")
    print(f"{name}: status {status}, {time.monotonic() - start:.0f} s, {found}", flush=True)
    violations = found.violations - Counter(PLANTED.get(name, {}))
    for violation, count in violations.most_common():
        print(f"{name}: VIOLATION {count} x {violation}", flush=True)
    return status == 0 and not violations


def main() -> int:
    """See above."""
    parser = argparse.ArgumentParser(prog="python -m tools.fakegpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--torch", default=GPU_MACHINE.torch, help="version of torch's CUDA wheel")
    parser.add_argument("--triton", default=GPU_MACHINE.triton, help="version of Triton")
    commands = parser.add_subparsers(dest="do", required=True)
    check = commands.add_parser("check")
    check.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    check.add_argument("--shard", type=Shard.parse, default=Shard(), help="K/N: the K-th of N parts of these")
    commands.add_parser("run").add_argument("argv", nargs=argparse.REMAINDER, metavar="COMMAND ...")
    options = parser.parse_args()
    environment = Environment(options.torch, options.triton)
    if options.do == "check" and (unknown := set(options.parts) - set(PARTS)):
        parser.error(f"parts are {', '.join(sorted(unknown))}; legal: {', '.join(PARTS)}")
    parts = []
    if options.do == "check":
        versions = f"torch {environment.torch}, Triton {environment.triton}"
        parts = [name for name in options.parts or PARTS if options.shard.holds(f"{name} of {versions}")]
        if not parts:
            print(f"{versions}: no part is in this shard")
            return 0
    start = time.monotonic()
    environment.set_up()
    print(
        f"torch {environment.torch}, Triton {environment.triton}: ready in {time.monotonic() - start:.0f} s", flush=True
    )
    if options.do == "run":
        return int(not run(environment, Path(options.argv[0]).name, options.argv))
    failed = [name for name in parts if not run(environment, name, PARTS[name])]
    print(f"FAILED: {', '.join(failed)}" if failed else "all passed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
