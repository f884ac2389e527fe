"""Finished blocks in a folder: bit for bit what was put there, complete or not at all, one run beside another."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from fastllama.errors import CheckpointError
from fastllama.io import save
from fastllama.io.finished_blocks import FinishedBlocks

TENSORS = {
    "packed": torch.arange(24, dtype=torch.int32).view(2, 12).T,
    "scales": torch.tensor([0.1, -0.2], dtype=torch.bfloat16),
    "zeros": torch.tensor([7, 8], dtype=torch.uint8),
}


def test_what_is_put_is_there_for_the_next_run_bit_for_bit(tmp_path: Path) -> None:
    blocks = FinishedBlocks(tmp_path / "a" / "blocks")
    assert blocks.get("one") is None
    assert not blocks.folder.exists(), "made before there is anything to keep"
    blocks.put("one", TENSORS)
    again = FinishedBlocks(blocks.folder)
    found = again.get("one")
    assert found is not None
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert again.get("two") is None
    assert again.found == {"one"}
    assert [path.name for path in blocks.folder.iterdir()] == ["one.safetensors"]


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), OSError),
        (SafetensorError("another"), SafetensorError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=["full", "other", "Ctrl-C"],
)
def test_an_interrupted_write_leaves_nothing(
    raised: BaseException, expected: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = FinishedBlocks(tmp_path)
    blocks.put("one", TENSORS)

    def half(tensors: object, file: Path, metadata: object) -> None:
        file.write_bytes(b"half")
        raise raised

    monkeypatch.setattr(save, "save_file", half)
    with pytest.raises(expected) as caught:
        blocks.put("two", TENSORS)
    if isinstance(caught.value, OSError):
        assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == ["one.safetensors"]
    assert blocks.get("two") is None


@pytest.mark.parametrize("left", [0, 7, 60, -1])
def test_a_damaged_file_is_named_with_what_to_do(left: int, tmp_path: Path) -> None:
    blocks = FinishedBlocks(tmp_path)
    blocks.put("one", TENSORS)
    file = tmp_path / "one.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(CheckpointError, match=r"one\.safetensors is damaged; delete it, and its block is quantized"):
        blocks.get("one")


def test_discard_deletes_what_this_run_used_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "blocks"
    FinishedBlocks(folder).put("found", TENSORS)
    FinishedBlocks(folder).put("others", TENSORS)
    blocks = FinishedBlocks(folder)
    blocks.get("found")
    blocks.put("put", TENSORS)
    blocks.discard()
    assert [path.name for path in folder.iterdir()] == ["others.safetensors"]
    rest = FinishedBlocks(folder)
    rest.get("others")
    rest.discard()
    assert list(tmp_path.iterdir()) == []
    rest.discard()
