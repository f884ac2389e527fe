"""Options and device of the stages that write their own results."""

from __future__ import annotations

import argparse
import sys
import traceback
from pathlib import Path

import torch


def options(doc: str | None, **added: object) -> argparse.Namespace:
    """Parses `--results`, `--dry`, and an option for each of `added`, whose values are the defaults."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="the file of JSON lines to add to")
    parser.add_argument("--dry", action="store_true", help="toy sizes, on a CPU with TRITON_INTERPRET=1")
    for name, default in added.items():
        parser.add_argument(f"--{name}", default=default, type=type(default))
    return parser.parse_args()


def device(dry: bool) -> torch.device:
    """The CPU for a dry run, else the first GPU."""
    return torch.device("cpu") if dry else torch.device("cuda", 0)


def say_failure(failure: Exception) -> None:
    """Print the traceback of a failure at once."""
    traceback.print_exception(failure)
    sys.stderr.flush()
