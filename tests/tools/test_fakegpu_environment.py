"""The environment in which commands start over the fake GPU, which need not have been set up."""

from __future__ import annotations

import subprocess

import pytest

from tools.fakegpu.environment import GPU_MACHINE


def test_what_the_caller_adds_to_pytest_is_not_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_ADDOPTS", "-q")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    seen = subprocess.run(GPU_MACHINE.command(["env"]), capture_output=True, text=True, check=True).stdout
    assert f"LD_LIBRARY_PATH={GPU_MACHINE.libraries}" in seen
    assert "PYTEST_ADDOPTS" not in seen
    assert "TRITON_INTERPRET" not in seen
