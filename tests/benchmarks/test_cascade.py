"""Cascade attention beside plain attention: bytes as counted by hand, both right, and the record of a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import cascade
from examples.cascade import queries_together
from fastllama.catalogue.maker import CPU, Maker
from fastllama.catalogue.sizes import TOY, LlamaSizes

SMALL = ["--shapes", "toy", "--batch", "4", "--prefix", "128", "--own", "20", "--dtype", "float32", "--rounds", "2"]


def test_bytes_are_those_of_the_tokens_that_are_read() -> None:
    """A 7B's token takes 16 KiB of a layer in bf16, a 70B's 4 KiB, whose 32 sequences are read for 8 at a time."""
    found = cascade.read_bytes(LlamaSizes.of("llama-2-7b"), 32, 4096, 256, 2)
    assert found == {"plain": 32 * 4352 * 16384, "cascade": (4096 + 32 * 256) * 16384}
    found = cascade.read_bytes(LlamaSizes.of("llama-2-70b"), 32, 4096, 256, 2)
    assert found == {"plain": 32 * 4352 * 4096, "cascade": (4 * 4096 + 32 * 256) * 4096}


@pytest.mark.parametrize(("batch", "heads_per_key", "together"), [(32, 1, 32), (32, 8, 8), (12, 8, 4), (7, 4, 1)])
def test_queries_together_divide_the_batch_and_fit_a_program(batch: int, heads_per_key: int, together: int) -> None:
    assert queries_together(batch, heads_per_key) == together


@pytest.mark.parametrize("own", [20, 64, 100])
def test_both_ways_are_attention_over_the_whole(own: int) -> None:
    ways = cascade.contenders(Maker.seeded(torch.float32, CPU, 0), TOY, 6, 128, own)
    exact = ways.pop("exact")()
    assert set(ways) == {"plain", "cascade"}
    for way in ways.values():
        torch.testing.assert_close(cascade.judged(way()).double(), exact, rtol=0, atol=1e-5)


def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["cascade", *SMALL, "--output", str(output)])
    cascade.main()
    found = json.loads(output.read_text(encoding="utf-8"))
    (sample,) = found["samples"]
    token = 2 * TOY.kv_heads * TOY.head_dim * 4
    assert {name: sample[name]["bytes"] for name in ("plain", "cascade")} == {
        "plain": 4 * 148 * token,
        "cascade": (128 + 4 * 20) * token,
    }
    for name in ("plain", "cascade"):
        assert len(sample[name]["seconds"]) == 2
        assert sample[name]["error_of_largest"] < 1e-5
    assert found["conditions"]["backends"]["merge_state"] == "reference"
    assert "toy: 0 MiB saved, 2.8 times less, " in capsys.readouterr().out


def test_a_prefix_that_ends_within_a_page_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["cascade", "--prefix", "100"])
    with pytest.raises(SystemExit):
        cascade.main()
    assert "--prefix is 100; legal: a multiple of 64" in capsys.readouterr().err
