"""Finished blocks in a folder: bit for bit what was put there, complete or not at all, one run beside another."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from fastllama.errors import CheckpointError
from fastllama.io import finished_blocks, save
from fastllama.io.finished_blocks import FinishedBlocks
from fastllama.io.formats.tensor_files import read_tensors

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


def test_a_file_that_put_did_not_write_for_the_key_is_damaged(tmp_path: Path) -> None:
    """A whole safetensors file of tensors that would fit is refused too."""
    blocks = FinishedBlocks(tmp_path)
    blocks.put("one", TENSORS)
    file = tmp_path / "one.safetensors"
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    damaged = [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in range(header, len(whole))]
    damaged.append(whole.replace(b'"scales"', b'"scalez"'))
    damaged.append(whole.replace(b'"BF16"', b'"F16" '))
    assert whole not in damaged
    blocks.put("two", TENSORS)
    damaged.append((tmp_path / "two.safetensors").read_bytes())
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, tmp_path / "foreign")
    damaged.append((tmp_path / "foreign").read_bytes())
    again = FinishedBlocks(tmp_path)
    for content in damaged:
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"one\.safetensors is damaged; delete it"):
            again.get("one")
    assert again.found == set()
    file.write_bytes(whole)
    assert again.get("one") is not None


def test_runs_that_write_the_same_block_at_once_do_not_write_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []

    def both(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
        written.append(file)
        if len(written) == 1:
            FinishedBlocks(tmp_path).put("one", TENSORS)
            assert FinishedBlocks(tmp_path).get("one") is not None
        save_file(tensors, file, metadata)

    monkeypatch.setattr(save, "save_file", both)
    FinishedBlocks(tmp_path).put("one", TENSORS)
    assert len(set(written)) == 2
    assert FinishedBlocks(tmp_path).get("one") is not None
    assert [path.name for path in tmp_path.iterdir()] == ["one.safetensors"]


def test_a_first_write_that_fails_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save, "save_file", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        FinishedBlocks(tmp_path / "a" / "blocks").put("one", TENSORS)
    assert list(tmp_path.iterdir()) == []


def test_what_another_run_deletes_is_not_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "blocks"
    mine, other = FinishedBlocks(folder), FinishedBlocks(folder)
    mine.put("one", TENSORS)
    mine.put("two", TENSORS)
    (folder / ".three.partial").mkdir()
    other.get("one")
    other.discard()
    assert {path.name for path in folder.iterdir()} == {"two.safetensors", ".three.partial"}
    mine.discard()
    assert {path.name for path in folder.iterdir()} == {".three.partial"}
    mine.put("three", TENSORS)
    shutil.rmtree(folder)
    mine.discard()
    mine.put("four", TENSORS)
    with monkeypatch.context() as patched:

        def too_late(file: Path) -> object:
            file.unlink()
            return read_tensors(file)

        patched.setattr(finished_blocks, "read_tensors", too_late)
        assert FinishedBlocks(folder).get("four") is None
