"""Reports on stderr that kernels are compiled, which takes seconds once for each kind of call on a machine."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from numba.core import event

PATIENCE = 0.5  # seconds of compilation that are not reported


@contextmanager
def announced() -> Iterator[None]:
    """Within, a line on stderr counts the kernels of a long compilation, on a terminal while they are compiled."""
    announcement = _Announcement(sys.stderr)
    with event.install_listener("numba:compile", announcement):
        try:
            yield
        finally:
            announcement.close()


class _Announcement(event.Listener):  # type: ignore[misc]  # Numba has no types for mypy
    """Counts kernels; the functions that they call are compiled as a part of them."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._live = stream, stream.isatty()
        self._start = 0.0
        self._depth = self._count = 0
        self._reported = False

    def on_start(self, event: event.Event) -> None:
        if not self._count and not self._depth:
            self._start = time.perf_counter()
        self._depth += 1

    def on_end(self, event: event.Event) -> None:
        self._depth -= 1
        if not self._depth:
            self._count += 1
            self._report()

    def close(self) -> None:
        """Report how long it took, if anything was reported."""
        if self._reported:
            seconds = time.perf_counter() - self._start
            kernels = "a kernel" if self._count == 1 else f"{self._count} kernels"
            line = f"fastllama: compiled {kernels} for this CPU in {seconds:.1f} s"
            print(f"\r{line:<60}" if self._live else line, file=self._stream)

    def _report(self) -> None:
        if time.perf_counter() - self._start < PATIENCE:
            return
        line = "fastllama: compiling kernels for this CPU, once"
        if self._live:
            print(f"\r{line}: {self._count}", end="", file=self._stream, flush=True)
        elif not self._reported:
            print(f"{line}: some seconds", file=self._stream, flush=True)
        self._reported = True
