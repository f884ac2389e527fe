"""Progress bars on standard error; silent where the process has none (pythonw, a service, `2>&-`)."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def has_console() -> bool:
    """Whether there is a standard error to write to; Python sets it to None where the process has none."""
    return sys.stderr is not None and not getattr(sys.stderr, "closed", False)


def progress_bar(title: str, shown: bool | None, **options: Any) -> Any:
    """A tqdm bar with these options. shown: None means on a terminal only. Silent without a console."""
    disable = not has_console() or (None if shown is None else not shown)  # None: tqdm checks for a terminal
    return tqdm(desc=title, disable=disable, leave=False, **options)
