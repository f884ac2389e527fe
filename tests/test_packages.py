"""Installed optional packages that fail to import: a fallback runs, or one line states the reason."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastllama import errors
from fastllama.errors import BackendError, ExtraRequiredError
from fastllama.io.hub import resolve_model
from fastllama.io.tokenizer import load_tokenizer
from fastllama.kernels.dispatch import backends
from fastllama.kernels.dispatch.backends import Backends, Kernels

BROKEN = {
    "ImportError": "ImportError('needs NumPy 2.2 or less')",
    "OSError": "OSError(30, 'Read-only file system')",
    "AttributeError": "AttributeError('np.bool8')",
    "RuntimeError": "RuntimeError('cannot cache function')",
    "SyntaxError": "SyntaxError('invalid syntax')",
}


def write_broken(folder: Path, package: str, raised: str) -> None:
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").write_text(f"raise {raised}")


@pytest.mark.parametrize("kind", BROKEN)
def test_why_a_package_does_not_work_is_what_its_import_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    write_broken(tmp_path, "broken_package", BROKEN[kind])
    monkeypatch.syspath_prepend(tmp_path)
    assert (errors.why_unusable("broken_package") or "").startswith(f"{kind}: ")
    said = str(ExtraRequiredError("this", "broken_package", "hf"))
    assert said.startswith(f"this needs 'broken_package', which is installed but cannot be imported ({kind}: ")
    assert errors.why_unusable("no_such_package") == errors.NOT_INSTALLED
    assert "which is not installed: pip install" in str(ExtraRequiredError("this", "no_such_package", "hf"))
    assert errors.why_unusable("json") is None


def test_a_table_of_kernels_that_cannot_be_imported_is_passed_over_and_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def table() -> dict[str, Kernels]:
        calls.append(None)
        raise OSError(30, "Read-only file system")

    calls: list[None] = []
    monkeypatch.setattr(backends, "_unusable", {})
    function = Backends("f", reference=torch.neg, cpu=torch.abs, numba=table, triton=table)
    monkeypatch.delenv("FASTLLAMA_BACKEND", raising=False)
    with caplog.at_level(logging.WARNING, "fastllama"):
        for _ in range(3):
            found = function.implementations("cpu")
    assert [each.backend for each in found] == ["cpu", "reference"]
    why = "Numba cannot be used: OSError: [Errno 30] Read-only file system"
    assert all(each.reason.endswith(f"; {why}") for each in found)
    assert (len(calls), caplog.messages) == (1, [f"{why}; its kernels are replaced by others"])


def test_triton_kernels_that_cannot_be_imported_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")

    def table() -> dict[str, Kernels]:
        raise AttributeError("no such driver")

    monkeypatch.setattr(backends, "_unusable", {})
    function = Backends("f", reference=torch.neg, triton=table)
    with pytest.raises(BackendError, match="Triton cannot be used: AttributeError: no such driver; legal without it"):
        function.launcher("cuda")


def test_a_broken_package_that_is_needed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("tokenizers", "huggingface_hub"):
        write_broken(tmp_path, package, BROKEN["AttributeError"])
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ExtraRequiredError, match=r"installed but cannot be imported \(AttributeError: np.bool8\)"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"huggingface_hub is needed: AttributeError: np\.bool8"):
        resolve_model("owner/name")


@pytest.mark.parametrize("package", ["numba", "triton", "transformers", "matplotlib", "tokenizers", "huggingface_hub"])
def test_the_command_runs_beside_any_broken_package(tmp_path: Path, package: str) -> None:
    write_broken(tmp_path, package, BROKEN["AttributeError"])
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    environment.pop("FASTLLAMA_BACKEND", None)
    command = [sys.executable, "-m", "fastllama", "generate", "--prompt", "Once", "-n", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["token_ids"]) == 2
    if package == "numba":
        assert "numba" not in found["backend"]
        said = (
            "fastllama: warning: Numba cannot be used: AttributeError: np.bool8; its kernels are replaced by others\n"
        )
        assert done.stderr == said
    else:
        assert "warning" not in done.stderr
