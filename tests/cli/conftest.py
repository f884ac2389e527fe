"""The command, run inside the test's process, and a model for it."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from fastllama.cli.main import main
from tests.cli.models import write_model


@dataclass(frozen=True)
class Done:
    """The exit status, output and errors of a command."""

    status: int
    out: str
    err: str


Command = Callable[..., Done]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("models") / "model"))


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Call it as `command("generate", "--model", path, stdin=b"...")`."""

    def run(*args: str | Path, stdin: bytes = b"") -> Done:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        status = main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        # Which command first compiles a kernel, and prints so, depends on what ran before.
        return Done(status, out, re.sub(r"fastllama: compil(ing|ed) .*\n", "", err))

    return run
