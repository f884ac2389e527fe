"""Compilation that takes long is reported on stderr; nothing else is."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("numba")
import numba

from fastllama.kernels.compiling import compiling_announced
from fastllama.kernels.numba import compiling


def compile_one() -> None:
    """A kernel that calls another."""

    @numba.njit
    def inner(x: Any) -> Any:
        return x + 1

    @numba.njit
    def outer(x: Any) -> Any:
        return inner(x) * 2

    assert outer(3) == 8


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_kernels_are_counted_without_what_they_call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiling, "PATIENCE", 0.0)
    with compiling_announced(torch.device("cpu")):
        compile_one()
        compile_one()
    first, last = capsys.readouterr().err.splitlines()
    assert first == "fastllama: compiling kernels for this CPU, once: some seconds"
    assert last.startswith("fastllama: compiled 2 kernels for this CPU in ")


def test_a_terminal_shows_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "PATIENCE", 0.0)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with compiling.announced():
        compile_one()
        compile_one()
    shown = sys.stderr.getvalue().split("\r")
    assert shown[1:3] == [f"fastllama: compiling kernels for this CPU, once: {count}" for count in (1, 2)]
    assert shown[3].startswith("fastllama: compiled 2 kernels")
    assert shown[3].endswith("\n")


def test_a_short_compilation_is_silent(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "PATIENCE", 60.0)
    with compiling.announced():
        compile_one()
    assert capsys.readouterr().err == ""


def test_what_is_compiled_elsewhere_is_not_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiling, "PATIENCE", 0.0)
    with compiling.announced():
        pass
    compile_one()
    assert capsys.readouterr().err == ""
