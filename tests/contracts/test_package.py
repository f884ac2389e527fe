"""Contract: one pure wheel carries everything the package needs, and runs from where it is installed."""

from __future__ import annotations

import email.message
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastllama

ROOT = Path(__file__).parents[2]
# What a build reads; anything else lying in a checkout must not change the wheel.
INPUTS = ("setup.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that the checkout stays as it is."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in INPUTS:
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "fastllama", source / "fastllama", ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_it_is_pure(wheel: Path) -> None:
    assert wheel.name == f"fastllama-{fastllama.__version__}-py3-none-any.whl"


def test_it_holds_the_whole_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = {path for path in (ROOT / "fastllama").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert packed == {path.relative_to(ROOT).as_posix() for path in files}
    assert "fastllama/py.typed" in packed
    assert {"fastllama/assets/tiny/model.safetensors", "fastllama/assets/calibration.txt"} <= packed


def test_it_declares_what_it_needs(metadata: email.message.Message) -> None:
    assert metadata["Version"] == fastllama.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    needs = metadata.get_all("Requires-Dist") or []
    base = {need.split(">=")[0]: need for need in needs if "extra ==" not in need}
    numbers = {"torch", "triton", "numpy", "safetensors"}
    assert set(base) == numbers | {"sentencepiece", "jinja2", "huggingface_hub", "tqdm"}
    assert "sys_platform" in base["triton"], "Triton is published for Linux alone"


def test_it_runs_where_it_is_installed(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    # `python -m` looks in the working directory first, so the installed package runs.
    command = [
        sys.executable,
        "-m",
        "fastllama",
        "generate",
        "--prompt",
        "Once",
        "--temperature",
        "0",
        "--max-tokens",
        "4",
    ]
    without_compiling = {**os.environ, "FASTLLAMA_BACKEND": "reference"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=without_compiling, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
