"""fastllama verify: its output, and that it fails on wrong weights."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from fastllama.kernels.dispatch.op import OPS
from tests.cli.conftest import Command


def test_quiet_is_one_line(command: Command, model: str) -> None:
    done = command("verify", "--model", model, "--quiet")
    assert (done.status, done.err) == (0, "")
    assert done.out == (
        f"parity: {len(OPS)} ops, 2 layers, logits and 32 greedy tokens agree with the reference (float32, cpu)\n"
    )


def test_the_table_and_the_json_agree(command: Command, model: str) -> None:
    done = command("verify", "--model", model, "--dtype", "bfloat16", "--json")
    assert (done.status, done.err) == (0, "")
    found = json.loads(done.out)
    assert found["ok"]
    assert (found["model"], found["dtype"], found["device"]) == (model, "bfloat16", "cpu")
    assert found["reference"] == "formulas in fp64"
    names = [row["name"] for row in found["rows"]]
    assert set(names) == {*OPS, "weights", "layer 0", "layer 1", "logits", "tokens", "replayed tokens"}
    table = command("verify", "--model", model, "--dtype", "bfloat16").out
    for row in found["rows"]:
        cells = [row["name"], row["backend"], row["case"], f"{row['error']:.1e}", f"{row['bound']:.1e}", "ok"]
        assert re.search("^" + r"\s+".join(map(re.escape, filter(None, cells))) + "$", table, re.MULTILINE), row["name"]
    assert table.endswith(f"\n\n{found['summary']}\n")


def test_a_wrong_kernel_fails_it_and_is_named(command: Command, model: str, bind: Callable[..., None]) -> None:
    """Embeddings of which half are a thousandth too large."""
    right = OPS["embedding"].implementation("cpu").run

    def wrong(ids: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        right(ids, weight, out)
        out[:, ::2] *= 1.001

    bind("embedding", wrong)
    done = command("verify", "--model", model, "--quiet")
    assert done.status == 1
    assert done.out.startswith("parity: FAILED in embedding (weight ")
    assert "layer 0" in done.out
    assert "rms_norm" not in done.out
    assert command("verify", "--model", model).out.count("  FAILED\n") >= 3
    rows = json.loads(command("verify", "--model", model, "--json").out)["rows"]
    assert {row["name"] for row in rows if not row["ok"]} >= {"embedding", "layer 0", "layer 1", "logits"}


def test_the_bundled_model_agrees(command: Command) -> None:
    """The line that `make demo` ends with."""
    done = command("verify", "--quiet")
    assert done.status == 0, done.out
    assert "agree with the reference" in done.out


def test_the_bundled_model_agrees_with_transformers(command: Command) -> None:
    done = command("verify", "--against", "transformers", "--json")
    assert (done.status, done.err) == (0, "")
    found = json.loads(done.out)
    assert found["ok"]
    assert found["reference"] == f"transformers {transformers.__version__}"
    assert f"with {found['reference']}: 5 layers, logits and 32 greedy tokens" in found["summary"]


def test_without_transformers_the_command_names_the_package_to_install(
    command: Command, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    done = command("verify", "--model", model, "--against", "transformers")
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert done.err.endswith("needs 'transformers', which is not installed: pip install 'fastllama[hf]'\n")


def test_a_wrong_folder_is_refused_against_transformers_too(command: Command, tmp_path: Path) -> None:
    done = command("verify", "--model", tmp_path, "--against", "transformers")
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert f"{tmp_path} is an empty folder" in done.err
