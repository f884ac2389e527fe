"""An archive of compiled kernels is found at another place, and kernels missing from it are compiled there."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tools import gpu_cache
from tools.fakegpu.environment import ROOT, current

pytestmark = pytest.mark.fakegpu

CALL = """
import torch
from fastllama.kernels import rms_norm, silu_mul
x = torch.ones(3, 64, device="cuda", dtype=torch.bfloat16)
silu_mul(x)
rms_norm(x, x[0])
"""


def install(archive: Path, folder: Path) -> dict[str, Any]:
    """The setup of the GPU machine."""
    command = ["python", "-m", "tools.gpu_cache", "install", str(archive), str(folder), "--jobs", "1"]
    done = subprocess.run(current().command(command), cwd=ROOT, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "cache.tar.xz"
    assert gpu_cache.make(current(), path, [["python", "-c", CALL]]) == 2
    return path


def test_kernels_are_found_at_another_place(archive: Path, tmp_path: Path) -> None:
    found = install(archive, tmp_path)
    assert found.pop("seconds") > 0
    assert found == {"kernels": 2, "hits": 2, "compiled": 0, "failed": [], "same_triton": True}
    assert not list(tmp_path.rglob("*.ttir"))  # a step on the way, which nothing would miss


def test_a_run_with_the_cache_compiles_nothing(archive: Path, tmp_path: Path) -> None:
    """Neither kernels nor launchers: no file is new."""
    install(archive, tmp_path)
    before = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    subprocess.run(current().command(["python", "-c", CALL], cache=tmp_path), cwd=ROOT, check=True)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == before


def test_what_is_missing_is_compiled(archive: Path, tmp_path: Path) -> None:
    contents = gpu_cache.unpack(archive, tmp_path / "unpacked")
    for path in (tmp_path / "unpacked").rglob("*norm_kernel*"):
        path.unlink()
    gpu_cache.pack(tmp_path / "unpacked", contents["specialisations"], "another", tmp_path / "less.tar.xz")
    found = install(tmp_path / "less.tar.xz", tmp_path / "installed")
    assert (found["hits"], found["compiled"], found["same_triton"]) == (1, 1, False)


def test_a_kernel_that_is_gone_costs_no_other(archive: Path, tmp_path: Path) -> None:
    contents = gpu_cache.unpack(archive, tmp_path / "unpacked")
    wanted = [text.replace("silu_mul_kernel", "gone_kernel") for text in contents["specialisations"]]
    gpu_cache.pack(tmp_path / "unpacked", wanted, contents["triton"], tmp_path / "old.tar.xz")
    found = install(tmp_path / "old.tar.xz", tmp_path / "installed")
    assert found["hits"] == 1
    assert [failure.split(":")[:2] for failure in found["failed"]] == [["gone_kernel", " AttributeError"]]
