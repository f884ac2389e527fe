"""The conditions of a measurement: the sources' commit is recorded where it is known, and left out elsewhere."""

from __future__ import annotations

import subprocess
from datetime import datetime, timedelta, timezone, tzinfo
from pathlib import Path

import pytest
import torch

from fastllama.bench import environment


def test_it_names_versions_and_the_device_that_is_asked_for() -> None:
    found = environment.environment(torch.device("cpu"))
    assert found["torch"] == torch.__version__
    assert (found["device"], found["gpu"]) == ("cpu", None)


def test_it_records_the_day_in_utc(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock 14 hours ahead of UTC, half an hour past its own midnight, still reads the day before."""

    class Ahead(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime(2026, 3, 1, 0, 30, tzinfo=timezone(timedelta(hours=14))).astimezone(tz)

    monkeypatch.setattr(environment, "datetime", Ahead)
    assert environment.environment(torch.device("cpu"))["date"] == "2026-02-28"


def test_it_names_the_switches_and_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLLAMA_PDL", "0")
    found = environment.environment(torch.device("cpu"))["switches"]
    assert (found["FASTLLAMA_PDL"], found["FASTLLAMA_GRAPHS"]) == ("0", "1")
    assert not any("/" in value for value in found.values())


def test_the_commit_is_that_of_the_sources_and_of_no_other_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package installed somewhere in another project's repository is not of that project's commit."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "fastllama" / "bench" / "environment.py"))
    assert environment.environment()["commit"] == head[:12]
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "site-packages" / "fastllama" / "bench" / "e.py"))
    (tmp_path / "site-packages").mkdir()
    assert environment.environment()["commit"] is None


def test_it_names_the_build_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Package metadata leave the variant out."""
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    assert environment.environment(torch.device("cpu"))["torch"] == "2.11.0+cu130"
