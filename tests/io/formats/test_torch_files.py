"""Files of torch.save that are damaged, compressed, or pickled in another way are read rightly, or refused by kind."""

from __future__ import annotations

import warnings
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama.errors import CheckpointError
from fastllama.io.formats.tensor_files import read_torch

TENSORS = {f"tensor {i}": torch.full((4, 8), float(i)) for i in range(3)}
TENSORS["view"] = TENSORS["tensor 0"][1:3]


def repacked(path: Path, *, cut: str = "", compression: int = zipfile.ZIP_STORED) -> Path:
    """TENSORS in a file of torch.save whose archive is written anew, one entry cut short or all compressed."""
    torch.save(TENSORS, path.with_suffix(".whole"))
    with zipfile.ZipFile(path.with_suffix(".whole")) as whole, zipfile.ZipFile(path, "w", compression) as archive:
        for name in whole.namelist():
            data = whole.read(name)
            archive.writestr(name, data[:10] if cut and name.endswith(cut) else data)
    return path


def same(found: dict[str, Tensor]) -> bool:
    return found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


@pytest.mark.parametrize("entry", ["data/0", "data/1", "data/2"])
def test_an_entry_that_is_shorter_than_its_tensor_is_refused(tmp_path: Path, entry: str) -> None:
    with pytest.raises(CheckpointError, match=r"a tensor's data is cut short; download or copy it again$"):
        read_torch(repacked(tmp_path / "file.bin", cut=entry))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_compressed_archive_is_read_as_one_that_is_not(tmp_path: Path, compression: int) -> None:
    assert same(read_torch(repacked(tmp_path / "file.bin", compression=compression)))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_protocol_is_read_or_named(tmp_path: Path, zipped: bool, protocol: int) -> None:
    path = tmp_path / "file.bin"
    torch.save(TENSORS, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none of torch's is shown
        if protocol < 4:
            assert same(read_torch(path))
            return
        with pytest.raises(CheckpointError) as raised:
            read_torch(path)
    assert str(raised.value) == (
        f"{path} is pickled with protocol {protocol}, which torch does not read without running code; "
        "save it with the default, 2"
    )


@pytest.mark.parametrize("length", [30, 100, 200, 300, 500, 700])
def test_an_old_file_that_ends_early_holds_no_objects(tmp_path: Path, length: int) -> None:
    path = tmp_path / "file.bin"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"it is truncated or damaged; download or copy it again$"):
        read_torch(path)


@pytest.mark.parametrize("content", [{"config": Path("x")}, {"args": Namespace(a=1)}])
@pytest.mark.parametrize("zipped", [True, False])
def test_objects_are_named(tmp_path: Path, content: Any, zipped: bool) -> None:
    path = tmp_path / "file.bin"
    torch.save(TENSORS | content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"holds Python objects.*; only tensors are read"):
        read_torch(path)
