"""fastllama info reports what is installed, and which implementation runs each op."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import fastllama
from fastllama import kernels
from tests.cli.conftest import Command


def test_json_states_what_runs_each_op_and_why(command: Command) -> None:
    done = command("info", "--json")
    assert (done.status, done.err) == (0, "")
    found = json.loads(done.out)
    assert found["versions"]["fastllama"] == fastllama.__version__
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["torch"] == metadata.version("torch")
    cpu = found["devices"][0]
    assert (cpu["type"], cpu["threads"]) == ("cpu", torch.get_num_threads())
    assert cpu["name"]
    assert cpu["capability"] == torch.backends.cpu.get_cpu_capability()
    assert cpu["memory_bytes"] > 0
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    assert [device["name"] for device in found["devices"][1:]] == gpus
    assert set(found["ops"]) == ({"cpu", "cuda"} if gpus else {"cpu"})
    for device, table in found["ops"].items():
        expected = {
            name: {"backend": implementation.backend, "reason": implementation.reason}
            for name, implementation in kernels.backend_of(device).items()
        }
        assert table == expected


def test_the_text_states_the_same(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version

    def without_transformers(name: str) -> str:
        if name == "transformers":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", without_transformers)
    done = command("info")
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    assert f"fastllama {fastllama.__version__}" in lines
    assert f"torch {torch.__version__}" in lines
    assert "transformers not installed" in lines
    assert "FASTLLAMA_BACKEND auto" in lines
    for name, implementation in kernels.backend_of("cpu").items():
        assert f"{name} {implementation.backend}: {implementation.reason}" in lines
    assert max(map(len, done.out.splitlines())) < 120


def test_a_forced_backend_shows_where_it_does_not_run(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = kernels.backend_of("cpu")["matmul_bf12"].backend
    monkeypatch.setenv("FASTLLAMA_BACKEND", "triton")
    done = command("info", "--json")
    assert done.status == 0
    found = json.loads(done.out)
    assert found["environment"]["FASTLLAMA_BACKEND"] == "triton"
    ops = found["ops"]["cpu"]
    assert ops["matmul_bf12"]["backend"] == usual
    assert ops["matmul_bf12"]["reason"].startswith("no Triton kernel yet; tensors on cpu")
    assert ops["rms_norm"]["backend"] == "nothing"
    assert ops["rms_norm"]["reason"].endswith("only in the interpreter; set TRITON_INTERPRET=1")


def test_where_compiled_kernels_are_kept_or_why_they_are_not(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache = pytest.importorskip("fastllama.kernels.numba.cache")

    def shown(home: Path) -> str:
        monkeypatch.setenv("XDG_CACHE_HOME", str(home))
        monkeypatch.setattr(cache, "FOLDER", cache.MachineCodeFolder())
        told = json.loads(command("info", "--json").out)["machine_code"]
        lines = [" ".join(line.split()) for line in command("info").out.splitlines()]
        assert f"compiled CPU kernels {told}" in lines
        return str(told)

    assert shown(tmp_path / "new") == str(tmp_path / "new" / "fastllama" / "numba")
    assert not (tmp_path / "new").exists(), "who asks changes nothing"
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "fastllama" / "numba"
    assert shown(tmp_path / "file") == f"{folder}, not writable: compiled anew in each process"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    folder = tmp_path / "fastllama" / "numba"
    assert shown(tmp_path) == f"{folder}, not writable: compiled anew in each process"
    monkeypatch.setitem(sys.modules, "numba", None)  # Python's own mark of what is not installed
    assert json.loads(command("info", "--json").out)["machine_code"] == "none, as numba is not installed"


def test_gpus_are_listed_with_what_they_have(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, major, minor, multi_processor_count, total_memory = "NVIDIA H200", 9, 0, 132, 139 * 2**30

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    found = json.loads(command("info", "--json").out)
    assert [device["type"] for device in found["devices"]] == ["cpu", "cuda", "cuda"]
    assert set(found["ops"]) == {"cpu", "cuda"}
    lines = [" ".join(line.split()) for line in command("info").out.splitlines()]
    assert lines.count("NVIDIA H200 cuda, capability 9.0, 132 multiprocessors, 139.0 GiB") == 2
