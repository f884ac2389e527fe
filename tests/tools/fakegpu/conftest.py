"""Programs on the fake GPU, each in a process of its own: their output, and their calls to the GPU."""

from __future__ import annotations

import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from tools.fakegpu import log
from tools.fakegpu.environment import current
from tools.fakegpu.log import Log

Program = Callable[[str], tuple[str, Log]]


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """`program(source)`: the output of Python source, and the log. Raises CalledProcessError where it fails."""

    def run(source: str) -> tuple[str, Log]:
        command = current().command(["python", "-c", textwrap.dedent(source)], tmp_path / "log")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout, log.read(tmp_path / "log")

    return run
