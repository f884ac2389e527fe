"""llama2.c files of versions 0, 1 and 2, tied and not, are read, and other files refused."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastllama.errors import CheckpointError
from fastllama.io.checkpoint import open_checkpoint
from fastllama.layers.config import LlamaConfig
from tests.io.checkpoints import SHAPES, hf_state, random_llama, write_llama2c


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kv_heads", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("version", [0, 1])
def test_fp32_versions_read_bit_for_bit(tmp_path: Path, version: int, kv_heads: int, tied: bool) -> None:
    model = random_llama(kv_heads=kv_heads, tied=tied)
    checkpoint = open_checkpoint(write_llama2c(model, tmp_path / "model.bin", version=version))
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
        tie_word_embeddings=tied,
        dtype="float32",
    )


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("group", [64, 32, 10])  # 10: groups run across rows, and scales start at odd addresses
def test_int8_groups_read_within_half_a_step(tmp_path: Path, group: int, tied: bool) -> None:
    small = {"kv_heads": 5, "num_attention_heads": 5, "hidden_size": 10, "intermediate_size": 15, "vocab_size": 33}
    model = random_llama(tied=tied, **(small if group == 10 else {}))
    found = dict(open_checkpoint(write_llama2c(model, tmp_path / "q.bin", version=2, group=group)).tensors())
    expected = hf_state(model)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if tensor.ndim == 1:
            assert torch.equal(found[name], tensor), name
            continue
        rotary = name.endswith(("q_proj.weight", "k_proj.weight"))
        # rows of rotary matrices are quantized in another order: bound them by the largest group there is
        steps = tensor.abs().max().expand(tensor.numel()) if rotary else group_maxima(tensor, group)
        error = (found[name] - tensor).abs().flatten()
        assert bool((error <= steps / 127 / 2 * (1 + 1e-5)).all()), name
        assert bool((error > 0).any()), name


def group_maxima(tensor: torch.Tensor, group: int) -> torch.Tensor:
    return tensor.reshape(-1, group).abs().amax(1).repeat_interleave(group)


def test_a_group_of_zeros_stays_zero(tmp_path: Path) -> None:
    model = random_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3].zero_()
    path = write_llama2c(model, tmp_path / "q.bin", version=2)
    found = dict(open_checkpoint(path).tensors())["model.layers.0.mlp.up_proj.weight"]
    assert bool((found[3] == 0).all())
    assert bool((found[2] != 0).any())


def patch(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


DAMAGE: dict[str, tuple[int, Callable[[Path], object], str]] = {
    "empty": (0, lambda path: path.write_bytes(b""), "is empty"),
    "header cut": (1, lambda path: path.write_bytes(path.read_bytes()[:30]), "has 30 bytes, too few for a llama2.c"),
    "v0 cut": (0, lambda path: path.write_bytes(path.read_bytes()[:-4]), "it is truncated or not a llama2.c file"),
    "v1 cut": (1, lambda path: path.write_bytes(path.read_bytes()[:-1]), "it is truncated or not a llama2.c file"),
    "v2 cut": (2, lambda path: path.write_bytes(path.read_bytes()[:300]), "it is truncated or not a llama2.c file"),
    "too long": (1, lambda path: path.write_bytes(path.read_bytes() + b"\0"), "bytes, expected"),
    "version 3": (1, lambda path: patch(path, 4, struct.pack("i", 3)), "(version 3; legal: 0, 1, 2)"),
    "no heads": (1, lambda path: patch(path, 20, struct.pack("i", 0)), "(dim 64 and 0 heads)"),
    "negative layers": (1, lambda path: patch(path, 16, struct.pack("i", -2)), "(num_hidden_layers is -2"),
    "2^31 layers": (
        0,
        lambda path: patch(path, 8, struct.pack("i", 2**31 - 1)),
        "it is truncated or not a llama2.c file",
    ),
    "flag": (1, lambda path: patch(path, 36, b"\x07"), "(shared classifier flag 7; legal: 0, 1)"),
    "group 0": (2, lambda path: patch(path, 37, struct.pack("i", 0)), "(group size 0; legal: a divisor"),
    "group 48": (2, lambda path: patch(path, 37, struct.pack("i", 48)), "(group size 48; legal: a divisor"),
    "text": (
        0,
        lambda path: path.write_text("once upon a time there was a little file"),
        "is text that begins with 'once",
    ),
    "GGUF": (0, lambda path: path.write_bytes(b"GGUF" + bytes(300)), "is a GGUF file, which is not read; give"),
    "a PyTorch file": (0, lambda path: torch.save({"a": torch.zeros(9)}, path), "give the folder that holds it"),
}


@pytest.mark.parametrize(("version", "damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_what_is_not_one_is_refused_when_opened(
    tmp_path: Path, version: int, damage: Callable[[Path], object], message: str
) -> None:
    path = write_llama2c(random_llama(), tmp_path / "model.bin", version=version)
    damage(path)
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(path)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)


def test_one_file_of_a_folder_is_refused(tmp_path: Path) -> None:
    random_llama().save_pretrained(tmp_path)
    for name in ("model.safetensors", "config.json"):
        with pytest.raises(CheckpointError, match=rf"{name} is one file of a model; give the folder"):
            open_checkpoint(tmp_path / name)
