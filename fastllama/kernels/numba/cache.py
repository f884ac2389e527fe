"""Compiled kernels, kept between processes in `env.machine_code_dir()/<state>`, a file for each signature.

Numba's own cache (`cache=True`) checks a kernel's own source file alone, so that after an upgrade an inlined helper
stays the old one; it needs a writable `__pycache__`, without which no kernel runs at all; and two processes that
compile two signatures at once can give both one file. Here the state is a hash over the compilers' versions and every
source that can reach machine code; a file is named by a hash of its key, replaced as a whole, and compared with its
key and its checksum when it is read. A kernel that cannot be read is compiled, one that cannot be written stays in
this process.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import re
import shutil
import sys
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps
from numba.core.sigutils import normalize_signature

from fastllama import env

logger = logging.getLogger("fastllama")

PACKAGE = Path(__file__).parents[2]
# The sources of kernels and of all that they import (tests/kernels/numba/test_cache.py reports what is missing here).
_FOLDERS = ("kernels/cpu", "kernels/dispatch", "kernels/launch", "kernels/numba", "kernels/reference")
_FILES = ("arithmetic.py", "env.py", "errors.py")
# Settings of Numba that change machine code; those of the CPU are in the key of each file.
_SETTINGS = ("OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "USING_SVML", "BOUNDSCHECK", "DEBUGINFO_DEFAULT")
_DIGEST = 32  # bytes, and hexadecimal digits of a name
STATES = 8  # that are kept, of versions of this package, Numba and Python side by side: up to 10 MB each


def sources(package: Path = PACKAGE) -> list[Path]:
    """Every source that can reach machine code, its constants among them."""
    found = [path for folder in _FOLDERS for path in (package / folder).rglob("*.py")]
    return sorted([*found, *(package / name for name in _FILES)])


def state_of(package: Path = PACKAGE) -> str:
    """A hash over the sources and the compilers. Raises OSError where there are no sources, as in a zip file."""
    versions = sys.version, sys.flags.optimize, numba.__version__, llvmlite.__version__, np.__version__
    settings = [getattr(numba.config, name, None) for name in _SETTINGS]
    digest = hashlib.sha256(repr((versions, settings)).encode())
    for path in sources(package):
        content = path.read_bytes()
        digest.update(f"\n{path.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:_DIGEST]


class MachineCodeFolder:
    """The files of one state of the sources, which may be missing, damaged or not writable."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.state = ""
        self.problem = ""  # why nothing is kept
        self._is_used = False
        try:
            self.state = state_of()  # of the imported sources, not of those on disk when a kernel is compiled
            self.path = env.machine_code_dir() / self.state
        except OSError as error:
            self.problem = str(error)

    def read(self, name: str, key: bytes) -> bytes | None:
        """The value written under a key; None if there is none, or its file is damaged."""
        if self.path is None:
            return None
        try:
            content = (self.path / name).read_bytes()
        except OSError:
            return None
        digest, body = content[:_DIGEST], content[_DIGEST:]
        if hashlib.sha256(body).digest() != digest or not body.startswith(key):
            return None
        if not self._is_used:
            self._is_used = True
            with suppress(OSError):
                os.utime(self.path)  # a state in use is not among the oldest
        return body[len(key) :]

    def write(self, name: str, key: bytes, value: bytes) -> None:
        """Replace a file as a whole: no reader sees a part of it. The first failure is logged and ends writing."""
        if self.path is None or self.problem:
            return
        temporary = self.path / f".{uuid.uuid4().hex}"
        try:
            if self.state != state_of():
                self.problem = "the sources have changed since they were imported"
                return
            if not self.path.is_dir():
                self.path.mkdir(parents=True, exist_ok=True)
                self._forget_states()
            temporary.write_bytes(hashlib.sha256(key + value).digest() + key + value)
            os.replace(temporary, self.path / name)
        except OSError as error:
            self.problem = str(error)
            logger.warning("machine code of CPU kernels is not kept, but compiled anew in each process: %s", error)
            with suppress(OSError):
                temporary.unlink()

    def _forget_states(self) -> None:
        """Remove the least recently used states."""
        assert self.path is not None
        with suppress(OSError):  # another process may do the same
            found = [path for path in self.path.parent.iterdir() if re.fullmatch(f"[0-9a-f]{{{_DIGEST}}}", path.name)]
            for path in sorted(found, key=lambda path: path.stat().st_mtime)[:-STATES]:
                shutil.rmtree(path, ignore_errors=True)


FOLDER = MachineCodeFolder()


class MachineCodeCache:
    """The cache of one kernel, with the interface that Numba's dispatchers use."""

    def __init__(self, function: Any) -> None:
        self._name = f"{function.__module__}.{function.__qualname__}"
        self._short = f"{function.__module__.rpartition('.')[2]}.{function.__qualname__}"
        self._is_enabled = True

    @property
    def cache_path(self) -> str | None:
        """The folder, shared with other kernels."""
        return None if FOLDER.path is None else str(FOLDER.path)

    def enable(self) -> None:
        """Load and save from now on."""
        self._is_enabled = True

    def disable(self) -> None:
        """Neither load nor save from now on."""
        self._is_enabled = False

    def flush(self) -> None:
        """Remove the files of this kernel."""
        for path in FOLDER.path.glob(f"{self._short}-*") if FOLDER.path else ():
            with suppress(OSError):
                path.unlink()

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled kernel for a signature; None if there is none, or its file is damaged."""
        target_context.refresh()
        if not self._is_enabled:
            return None
        found = FOLDER.read(*self._place(sig, target_context.codegen()))
        if found is None:
            return None
        try:
            result = CompileResult._rebuild(target_context, *pickle.loads(found))
        except Exception:  # undamaged, but not as this Numba writes it: compiling is always right
            return None
        return result if tuple(result.signature.args) == tuple(normalize_signature(sig)[0]) else None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep machine code, unless addresses of this process are in it."""
        if not self._is_enabled or data.library.has_dynamic_globals or data.lifted:
            return
        FOLDER.write(*self._place(sig, data.codegen), dumps(data._reduce()))

    def _place(self, sig: Any, codegen: Any) -> tuple[str, bytes]:
        """A file's name and its key."""
        args, result = normalize_signature(sig)
        types = [(type(each).__name__, str(each)) for each in (*args, result)]
        key = repr((FOLDER.state, self._name, types, codegen.magic_tuple())).encode() + b"\n"
        return f"{self._short}-{hashlib.sha256(key).hexdigest()[:_DIGEST]}", key


def kept(dispatcher: Any) -> Any:
    """A dispatcher with a cache, unless its function is a closure or in a source that is not hashed."""
    function = getattr(dispatcher, "py_func", None)
    if function is not None and function.__module__.startswith(__package__ + ".") and function.__closure__ is None:
        dispatcher._cache = MachineCodeCache(function)
    return dispatcher


def described() -> str:
    """Where machine code is kept, or why it is not. Writes nothing."""
    if FOLDER.path is None or FOLDER.problem:
        return f"not kept, compiled anew in each process: {FOLDER.problem}"
    there = next(path for path in (FOLDER.path, *FOLDER.path.parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        return f"{FOLDER.path.parent}, not writable: compiled anew in each process"
    return str(FOLDER.path.parent)
