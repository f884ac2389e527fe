"""Fixtures of several files of the runtime's tests."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest

from fastllama.runtime.device.runner import Runner


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretends that a device runs by itself, so that steps are launched ahead."""
    init = Runner.__init__

    def initialise(self: Runner, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        self.runs_ahead = True

    monkeypatch.setattr(Runner, "__init__", initialise)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt: in a process that a shell runs in the background it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
