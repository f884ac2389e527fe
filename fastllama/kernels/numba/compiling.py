"""Says on stderr that kernels are compiled, which takes seconds once for each kind of call on a machine."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from numba.core import event

PATIENCE = 0.5  # seconds of compilation that pass without a word


@contextmanager
def announced() -> Iterator[None]:
    """Within, a line on stderr tells how many kernels are compiled, where it takes long; on a terminal, as they are."""
    announcement = _Announcement(sys.stderr)
    with event.install_listener("numba:compile", announcement):
        try:
            yield
        finally:
            announcement.close()


class _Announcement(event.Listener):  # type: ignore[misc]  # Numba has no types for mypy
    """Counts kernels: what they call is compiled on the way, as a part of them."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._live = stream, stream.isatty()
        self._start = 0.0
        self._depth = self._count = 0
        self._said = False

    def on_start(self, event: event.Event) -> None:
        if not self._count and not self._depth:
            self._start = time.perf_counter()
        self._depth += 1

    def on_end(self, event: event.Event) -> None:
        self._depth -= 1
        if not self._depth:
            self._count += 1
            self._say()

    def close(self) -> None:
        """Say how long it took, if anything was said."""
        if self._said:
            seconds = time.perf_counter() - self._start
            kernels = "a kernel" if self._count == 1 else f"{self._count} kernels"
            line = f"fastllama: compiled {kernels} for this CPU in {seconds:.1f} s"
            print(f"\r{line:<60}" if self._live else line, file=self._stream)

    def _say(self) -> None:
        if time.perf_counter() - self._start < PATIENCE:
            return
        line = "fastllama: compiling kernels for this CPU, once"
        if self._live:
            print(f"\r{line}: {self._count}", end="", file=self._stream, flush=True)
        elif not self._said:
            print(f"{line}: some seconds", file=self._stream, flush=True)
        self._said = True
