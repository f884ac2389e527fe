"""What tests of several files of this room are given."""

from __future__ import annotations

from typing import Any

import pytest

from fastllama.runtime.device.runner import Runner


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that runs by itself, as it seems."""
    init = Runner.__init__

    def initialise(self: Runner, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        self.runs_ahead = True

    monkeypatch.setattr(Runner, "__init__", initialise)
