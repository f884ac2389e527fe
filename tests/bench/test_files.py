"""Result files: a path that cannot be written is refused at once, and a file is never half written."""

from __future__ import annotations

import argparse
import json
import os
import threading
from pathlib import Path

import pytest

from fastllama.bench import files


def test_a_record_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader must not meet half a file: its writer may be ended at any moment."""
    path = tmp_path / "record.json"
    files.write_record(path, {"cases": [1]})

    def ended(self: Path, text: str, encoding: str) -> int:
        self.write_bytes(text[:3].encode())
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", ended)
    with pytest.raises(KeyboardInterrupt):
        files.write_record(path, {"cases": [1, 2]})
    assert path.read_text() == '{\n "cases": [\n  1\n ]\n}\n'


def test_a_link_stays_one_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "there" / "a.json")
    files.write_record(files.output_file(str(link)), {"a": 1})
    assert link.is_symlink()
    assert json.loads((tmp_path / "there" / "a.json").read_text()) == {"a": 1}
    assert os.listdir(tmp_path / "there") == ["a.json"]


def test_a_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    pipe, found = tmp_path / "pipe", list[str]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_text()))
    reader.start()
    files.write_record(files.output_file(str(pipe)), {"a": 1})
    reader.join(10)
    assert json.loads(found[0]) == {"a": 1}
    assert pipe.is_fifo()


@pytest.mark.parametrize("existing", [False, True])
def test_a_file_that_can_be_written_is_left_as_it_was(tmp_path: Path, existing: bool) -> None:
    path = tmp_path / "a.json"
    if existing:
        path.write_text("before")
    assert files.output_file(str(path)) == path
    assert [file.read_text() for file in tmp_path.iterdir()] == (["before"] if existing else [])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "Is a directory"),
        (".", "Is a directory"),
        ("folder", "Is a directory"),
        ("nowhere/a.json", "there is no folder '.*nowhere' to write 'a.json' into"),
        ("file/a.json", "there is no folder '.*file' to write 'a.json' into"),
        ("a" * 255, "File name too long"),
        ("locked", "Permission denied"),
    ],
)
def test_what_cannot_be_written_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, says: str
) -> None:
    (tmp_path / "folder").mkdir()
    for file in ("file", "locked"):
        (tmp_path / file).touch()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked")  # who runs this may be root
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(argparse.ArgumentTypeError, match=says):
        files.output_file(str(tmp_path / name) if name not in ("", ".") else name)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_without_write_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> None:
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(argparse.ArgumentTypeError, match="cannot be written: Read-only file system"):
        files.output_file(str(tmp_path / "a.json"))
