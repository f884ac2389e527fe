"""Result files: checked before a measurement of minutes starts, replaced atomically."""

from __future__ import annotations

import errno
import json
import os
from argparse import ArgumentTypeError
from pathlib import Path
from typing import Any


def output_file(value: str) -> Path:
    """The argparse type of an output file, which need not exist. Creates no file.

    Raises ArgumentTypeError where it cannot be written.
    """
    path = Path(value)
    if not path.absolute().parent.is_dir():
        raise ArgumentTypeError(f"there is no folder {str(path.parent)!r} to write {path.name!r} into")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if not _is_special(path):
            _part(path).touch()
            _part(path).unlink()
    except OSError as error:
        raise ArgumentTypeError(f"{value!r} cannot be written: {error.strerror}; legal: a file or a new name") from None
    return path


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a result with its conditions as JSON, atomically: an interrupted process leaves the previous file.

    Devices and pipes, such as /dev/stdout, are written directly.
    """
    text = json.dumps(record, indent=1) + "\n"
    if _is_special(path):
        with path.open("a", encoding="utf-8") as stream:
            stream.write(text)
        return
    part = _part(path)
    part.write_text(text, encoding="utf-8")
    part.replace(path.resolve())  # a link's target


def _is_special(path: Path) -> bool:
    return path.exists() and (not path.is_file() or path.is_relative_to("/dev"))


def _part(path: Path) -> Path:
    target = path.resolve()
    return target.with_name(f"{target.name}.part")
