"""Patterns among the targets of compressed-tensors: usual ones match, those that might run for years are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastllama.errors import CheckpointError
from fastllama.io.packed.quantization_config import read_config
from tests.io.compressed import group, weights

HOSTILE = [
    "(a*)*$",
    r"(([a-z._0-9]+)+)+Z",
    r"(\w+|\.)+(\w+|\.)+!",
    "(?:.*){9}!",
    ".*" * 6 + "!",
    ".+" * 6 + "!",
    ".{1,9}" * 6 + "!",
    ".?" * 40 + "." * 40,
    "(.|model|layers)" * 6,
    r"(?x)(\w*) *Z",
    "(?x)(a*)# twice\n*Z",
    "(a*)(?#twice)*Z",
]


@pytest.mark.parametrize("key", ["ignore", "config_groups.group_0.targets"])
@pytest.mark.parametrize("pattern", HOSTILE)
def test_a_pattern_that_may_take_years_is_never_matched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, key: str
) -> None:
    """The measure is that nothing is matched: a match cannot be interrupted."""
    groups = {"group_0": group(weights(4, 32), ["Linear"])}
    quantization = {"format": "pack-quantized", "config_groups": groups, "ignore": []}
    place = quantization if key == "ignore" else groups["group_0"]
    place[key.rpartition(".")[2]] = ["lm_head", f"re:{pattern}"]

    def matched(*arguments: Any) -> None:
        pytest.fail("matched")

    monkeypatch.setattr("fastllama.io.packed.quantization_config.re.match", matched)
    with pytest.raises(CheckpointError) as raised:
        read_config(quantization, tmp_path / "config.json", {"model.layers.0.mlp.up_proj": 64})
    assert f"quantization_config: {key} is 're:" in str(raised.value)
    assert "legal: a pattern in which no group is repeated, with at most 5 of * + ? { and 5 groups" in str(raised.value)


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        (r".*lm_head", 1),
        (r"(?:.*\.)?mlp\..*", 3),
        (r"model.layers.[0-9]+.self_attn.(q|k|v)_proj$", 3),
        (r"model\.layers\.\d{1,2}\.mlp\.(gate|up)_proj", 2),
        (r".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)$", 7),
        (r"^(?!.*lm_head)(?=.*proj).*$", 7),
    ],
)
def test_the_usual_patterns_are_taken(pattern: str, count: int) -> None:
    names = [f"model.layers.0.self_attn.{each}_proj" for each in "qkvo"]
    names += [f"model.layers.0.mlp.{each}_proj" for each in ("gate", "up", "down")]
    found = read_config(
        {"format": "pack-quantized", "config_groups": {"all": group(weights(4, 32), [f"re:{pattern}"])}},
        Path("config.json"),
        dict.fromkeys([*names, "lm_head"], 64),
    )
    assert len(found) == count
