"""Progress bars on standard error, also where there is none (pythonw, a service, `2>&-`)."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def has_console() -> bool:
    """Whether there is a standard error to write to; Python sets it to None where the process has none."""
    return sys.stderr is not None and not getattr(sys.stderr, "closed", False)


def progress_bar(title: str, shown: bool | None, **options: Any) -> Any:
    """A bar of tqdm, which takes `options`. shown: None means on a terminal only. Without a console it is silent."""
    disable = not has_console() or (None if shown is None else not shown)  # tqdm asks the console if it is None
    return tqdm(desc=title, disable=disable, leave=False, **options)
