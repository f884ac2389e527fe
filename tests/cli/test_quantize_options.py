"""fastllama quantize: each option reaches the library, and the printed commands can be run."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.conftest import Command
from tests.cli.models import WORDS

Call = tuple[tuple[Any, ...], dict[str, Any]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """The arguments of the library's quantize; nothing is quantized."""
    seen: list[Call] = []
    monkeypatch.setattr("fastllama.layers.quantizing.quantize", lambda *args, **named: seen.append((args, named)))
    return seen


def test_each_option_reaches_the_library(
    calls: list[Call], command: Command, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastllama.io.load.resolve_device", lambda name: torch.device(name))
    options = ("--scheme", "int8", "--method", "rtn", "--group-size", "32", "--dtype", "bfloat16", "--device", "cuda:1")
    assert command("quantize", model, tmp_path / "out", *options).status == 0
    ((args, named),) = calls
    assert args[1:] == ("int8", "rtn")
    assert (named["group_size"], named["device"]) == (32, torch.device("cuda:1"))
    assert args[0].dtype == torch.bfloat16


def test_weights_stay_in_host_memory_whatever_computes(
    calls: list[Call], command: Command, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fastllama.io.load.resolve_device", lambda name: torch.device("meta" if name != "cpu" else name)
    )
    assert command("quantize", model, tmp_path / "out", "--method", "rtn").status == 0
    ((args, named),) = calls
    assert (args[0].device.type, named["device"].type) == ("cpu", "meta")


def test_128_documents_are_read_by_default(calls: list[Call], command: Command, model: str, tmp_path: Path) -> None:
    done = command("quantize", model, tmp_path / "out", "--calibration", "-", "--per-line", stdin=b"a fox\n" * 300)
    assert done.status == 0
    ((_, named),) = calls
    assert len(named["documents"]) == 128


@pytest.mark.parametrize("method", ["gptq", "awq", "smoothquant"])
def test_fewer_tokens_than_columns_are_a_warning(
    method: str, calls: list[Call], command: Command, model: str, tmp_path: Path
) -> None:
    """The widest layer, down_proj, has 96."""
    scheme = "w8a8" if method == "smoothquant" else "int4"
    args = ("quantize", model, "--scheme", scheme, "--method", method, "--calibration", "-", "--samples", "1")
    stdin = " ".join([WORDS] * 9).encode()
    few = command(*args, tmp_path / "few", "--context", "95", stdin=stdin)
    said = "calibrated on 95 tokens, fewer than the 96 columns of the widest layer: rtn may lose less"
    assert (few.status, few.err) == (0, f"fastllama: warning: {said}\n")
    enough = command(*args, tmp_path / "enough", "--context", "96", stdin=stdin)
    assert (enough.status, enough.err) == (0, "")


def test_a_folder_named_as_the_bundled_model_is_measured_as_a_folder(
    calls: list[Call], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = command("quantize", "tiny", "tiny", "--method", "rtn")
    (line,) = (each for each in done.out.splitlines() if each.startswith("measure"))
    assert shlex.split(line)[1:] == ["fastllama", "perplexity", "--model", "./tiny", "--against", "tiny"]


def test_a_tilde_is_the_home_in_every_path(
    calls: list[Call], command: Command, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    shutil.copytree(model, tmp_path / "source")
    (tmp_path / "text.txt").write_text(f"{WORDS}\n" * 9, encoding="utf-8")
    done = command("quantize", "~/source", "~/out", "--calibration", "~/text.txt", "--resume", "~/blocks")
    assert (done.status, done.err) == (0, "")
    ((_, named),) = calls
    assert named["finished"].folder == tmp_path / "blocks"
    assert (tmp_path / "out" / "config.json").is_file()
    refused = command("quantize", "~/source", "~/new", "--resume", "~/source/blocks")
    assert "which is SRC or in it; legal: a folder elsewhere" in refused.err
