"""Meta's folders: 1, 2 and 8 files merge into the tensors that transformers has for the same model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastllama.errors import CheckpointError
from fastllama.io.checkpoint import open_checkpoint
from fastllama.io.formats.meta import half_split
from fastllama.layers.config import LlamaConfig
from tests.io.checkpoints import SHAPES, hf_state, interleaved, random_llama, write_meta


@pytest.mark.parametrize("shards", [1, 2, 8])
@pytest.mark.parametrize("kv_heads", [16, 8])
def test_files_merge_bit_for_bit(tmp_path: Path, kv_heads: int, shards: int) -> None:
    model = random_llama(kv_heads=kv_heads, dtype=torch.bfloat16)
    checkpoint = open_checkpoint(write_meta(model, tmp_path / "meta", shards=shards))
    found, expected = dict(checkpoint.tensors()), hf_state(model)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert checkpoint.config == LlamaConfig(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=kv_heads,
        head_dim=4,
        dtype="bfloat16",
    )


@pytest.mark.parametrize("heads", SHAPES.values(), ids=SHAPES)
def test_half_split_undoes_metas_order(heads: int) -> None:
    weight = torch.randn(heads * 6, 5)
    assert torch.equal(half_split(interleaved(weight, heads), heads, "w"), weight)
    assert not torch.equal(half_split(weight, heads, "w"), weight)


@pytest.mark.parametrize("shape", [(9, 4), (8,)])
def test_half_split_needs_even_heads(shape: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointError, match=rf"^w has shape \[{shape[0]}"):
        half_split(torch.zeros(shape), 2, "w")


def edit(path: Path, file: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = {name: tensor.clone() for name, tensor in torch.load(path / file).items()}
    change(state)
    torch.save(state, path / file)


def truncate(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


SECOND = "consolidated.01.pth"
WQ = "layers.0.attention.wq.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "first file missing": (
        lambda path: (path / "consolidated.00.pth").unlink(),
        "consolidated.00.pth does not exist, but",
    ),
    "last file missing": (
        lambda path: (path / SECOND).unlink(),
        "hold 32 of the 64 columns of tensor tok_embeddings.weight; are all files there?",
    ),
    "all files missing": (lambda path: [file.unlink() for file in path.glob("*.pth")], "holds no consolidated.00.pth"),
    "truncated": (lambda path: truncate(path / SECOND), f"{SECOND} cannot be read as PyTorch weights"),
    "not in all": (lambda path: edit(path, SECOND, lambda s: s.pop(WQ)), f"{SECOND}: tensor {WQ} is not in all of"),
    "no embedding": (
        lambda path: [edit(path, file.name, lambda s: s.pop("tok_embeddings.weight")) for file in path.glob("*.pth")],
        "tensor tok_embeddings.weight is missing",
    ),
    "params truncated": (lambda path: truncate(path / "params.json"), "params.json is not valid JSON"),
    "params of another model": (
        lambda path: (path / "params.json").write_text(json.dumps({"dim": 64, "moe": {"num_experts": 8}})),
        "params.json: moe is {'num_experts': 8}; legal: none",
    ),
    "uneven parts": (
        lambda path: edit(path, SECOND, lambda s: s.update({WQ: torch.zeros(8, 64)})),
        f"tensor {WQ} has shapes [[32, 64], [8, 64]]",
    ),
    "odd rows": (
        lambda path: [
            edit(path, file.name, lambda s: s.update({WQ: torch.zeros(9, 64)})) for file in path.glob("*.pth")
        ],
        f"tensor {WQ} has shape [18, 64], expected a matrix whose rows make 16 even heads",
    ),
    "vectors": (
        lambda path: [
            edit(path, file.name, lambda s: s.update({"layers.0.attention.wo.weight": torch.zeros(9)}))
            for file in path.glob("*.pth")
        ],
        "tensor layers.0.attention.wo.weight has shape [9], expected a matrix",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_folder_is_refused(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    path = write_meta(random_llama(), tmp_path / "meta", shards=2)
    damage(path)
    with pytest.raises((CheckpointError, FileNotFoundError)) as raised:
        list(open_checkpoint(path).tensors())
    assert message in str(raised.value)
    assert str(path) in str(raised.value)


def test_an_unknown_tensor_keeps_its_name(tmp_path: Path) -> None:
    path = write_meta(random_llama(), tmp_path / "meta")
    edit(path, "consolidated.00.pth", lambda state: state.update({"layers.0.attention.gate.weight": torch.zeros(1)}))
    assert "layers.0.attention.gate.weight" in dict(open_checkpoint(path).tensors())
