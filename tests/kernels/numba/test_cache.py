"""The cache of compiled kernels on disk: never stale, never another kernel's, and never required."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("numba")
import numba

from fastllama import env
from fastllama.kernels.numba import cache, compiling, swiglu
from fastllama.kernels.numba.numerics import LIKE, jit
from tools.rooms import imported, module_name

ROOT = Path(__file__).parents[3]
SIZE = 40
# Runs silu_mul in the dtypes that are named; prints whether it is right, and how many functions were compiled.
SCRIPT = """
import sys
from numba.core import event
compiled = []
class Noted(event.Listener):
    def on_start(self, event): compiled.append(event)
    def on_end(self, event): pass
event.register("numba:compile", Noted())
import torch
from fastllama import kernels
gate, up = torch.full((2, 64), 1.0), torch.full((2, 64), 2.0)
for name in sys.argv[1:]:
    found = kernels.silu_mul(torch.cat([gate, up], 1).to(getattr(torch, name)))
    print(f"{found.unique().item():.2f}", end=" ")
print(len(compiled))
"""
ONE = "1.46"  # silu(1) * 2


def start(*dtypes: str, package: Path = ROOT, **variables: str | None) -> subprocess.Popen[str]:
    given = os.environ | {"PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1", **variables}
    given = {name: value for name, value in given.items() if value is not None}
    command = [sys.executable, "-c", SCRIPT, *dtypes]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=given, cwd=package, text=True, **pipes)


def finish(process: subprocess.Popen[str]) -> tuple[list[str], int, str]:
    """The results, how many functions were compiled, and stderr."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    *results, compiled = out.split()
    return results, int(compiled), err


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> cache.MachineCodeFolder:
    """This process's cache is in a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = cache.MachineCodeFolder()
    monkeypatch.setattr(cache, "FOLDER", made)
    return made


def run_anew(dtype: torch.dtype = torch.float32) -> int:
    """Call a kernel as a new process would; how many of its signatures came from the cache."""
    kernel = jit(swiglu.silu_mul_row_kernel.py_func)
    x, out = torch.randn(2 * SIZE).to(dtype), torch.empty(SIZE, dtype=dtype)
    kernel(x.data_ptr(), x[SIZE:].data_ptr(), out.data_ptr(), 0, 0, 0, SIZE, LIKE[dtype])
    expected = torch.nn.functional.silu(x[:SIZE].double()) * x[SIZE:].double()
    torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=1e-2)
    assert sum(kernel.stats.cache_hits.values()) + sum(kernel.stats.cache_misses.values()) == 1
    return sum(kernel.stats.cache_hits.values())


def test_the_state_is_made_of_all_that_kernels_import() -> None:
    by_name = {module_name(path): path for path in (ROOT / "fastllama").rglob("*.py")}
    # these two define nothing: they are named on the way to what is below them
    del by_name["fastllama"], by_name["fastllama.kernels"]
    found: set[str] = set()
    new = {module_name(path) for path in (ROOT / "fastllama" / "kernels" / "numba").glob("*.py")}
    while new:
        found |= new
        new = {each for name in new for each in imported(by_name[name]) if each in by_name} - found
    assert not found - {module_name(path) for path in cache.sources()}


def test_a_helper_that_changes_in_another_file_is_compiled_anew(tmp_path: Path) -> None:
    package = tmp_path / "site" / "fastllama"
    shutil.copytree(ROOT / "fastllama", package, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    place: dict[str, Any] = {"package": package.parent, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    results, compiled, _ = finish(start("float32", **place))
    assert (results, compiled > 0) == ([ONE], True)
    helper = package / "kernels" / "numba" / "numerics.py"
    before = helper.read_text(encoding="utf-8")
    assert before.count("power = (p") == 1
    helper.write_text(before.replace("power = (p", "power = np.float32(3) * (p"), encoding="utf-8")
    results, compiled, _ = finish(start("float32", **place))
    assert (results, compiled > 0) == (["0.95"], True)  # 2 / (1 + 3 / e)
    helper.write_text(before, encoding="utf-8")
    assert finish(start("float32", **place)) == ([ONE], 0, "")
    assert not list(package.rglob("*.nb[ci]"))


def test_a_constant_of_another_folder_is_part_of_the_state(tmp_path: Path) -> None:
    package = tmp_path / "fastllama"
    shutil.copytree(ROOT / "fastllama", package, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    states = {cache.state_of(package)}
    for name in ("kernels/reference/int4.py", "kernels/cpu/matmul.py", "arithmetic.py", "kernels/numba/vectors.py"):
        path = package / name
        path.write_bytes(path.read_bytes() + b"\n")
        states.add(cache.state_of(package))
    (package / "kernels" / "numba" / "vectors.py").rename(package / "kernels" / "numba" / "lanes.py")
    states.add(cache.state_of(package))
    assert len(states) == 6


def test_a_setting_that_changes_machine_code_is_part_of_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    before = cache.state_of()
    monkeypatch.setattr(numba.config, "BOUNDSCHECK", 1)
    assert cache.state_of() != before


def test_what_was_compiled_is_loaded(folder: cache.MachineCodeFolder) -> None:
    assert [run_anew(), run_anew(), run_anew(torch.bfloat16), run_anew(torch.bfloat16)] == [0, 1, 0, 1]
    assert len(files(folder.path)) == 2
    assert swiglu.silu_mul_row_kernel.stats.cache_path == str(folder.path)


def test_what_is_loaded_is_not_announced_as_compiled(
    folder: cache.MachineCodeFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiling, "PATIENCE", 0.0)
    run_anew()
    with compiling.announced():
        run_anew()
    assert capsys.readouterr().err == ""
    with compiling.announced():
        run_anew(torch.bfloat16)
    assert "compiled a kernel for this CPU" in capsys.readouterr().err


def test_processes_that_start_at_once_share_what_they_compile(tmp_path: Path) -> None:
    """Numba's own cache may give two signatures one file there."""
    place = {"XDG_CACHE_HOME": str(tmp_path)}
    orders = [("float32",), ("bfloat16",), ("float16",), ("float16", "float32")]
    processes = [start(*dtypes, **place) for dtypes in orders]
    for dtypes, process in zip(orders, processes, strict=True):
        results, _, err = finish(process)
        assert (results, err) == ([ONE] * len(dtypes), "")
    assert finish(start("bfloat16", "float32", "float16", **place)) == ([ONE] * 3, 0, "")
    assert not [path for path in files(tmp_path) if path.name.startswith(".")]


def spoil(path: Path, how: str, other: Path) -> None:
    content = path.read_bytes()
    spoilt = {
        "empty": b"",
        "truncated": content[:-100],
        "one bit": content[:2000] + bytes([content[2000] ^ 1]) + content[2001:],
        "garbage": os.urandom(500),
        "another signature's": other.read_bytes(),
    }
    path.write_bytes(spoilt[how])


@pytest.mark.parametrize("how", ["empty", "truncated", "one bit", "garbage", "another signature's"])
def test_a_file_that_is_not_what_was_written_is_replaced(folder: cache.MachineCodeFolder, how: str) -> None:
    run_anew()
    (path,) = files(folder.path)
    run_anew(torch.bfloat16)
    (other,) = set(files(folder.path)) - {path}
    spoil(path, how, other)
    assert [run_anew(), run_anew()] == [0, 1]


def test_a_file_answers_to_its_own_key_alone(folder: cache.MachineCodeFolder) -> None:
    folder.write("name", b"one key", b"value")
    assert folder.read("name", b"one key") == b"value"
    assert folder.read("name", b"another") is None


def test_code_for_other_arguments_is_not_run_even_under_the_right_key(
    folder: cache.MachineCodeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache.MachineCodeCache, "_place", lambda *args: ("name", b"key"))
    assert [run_anew(), run_anew(torch.bfloat16), run_anew(torch.bfloat16)] == [0, 0, 1]


def test_a_whole_file_that_numba_cannot_read_is_replaced(
    folder: cache.MachineCodeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cache, "dumps", lambda value: b"not a pickle")
        run_anew()
    assert [run_anew(), run_anew()] == [0, 1]


def test_a_folder_in_a_files_place_is_no_cache(folder: cache.MachineCodeFolder) -> None:
    run_anew()
    (path,) = files(folder.path)
    path.unlink()
    path.mkdir()
    assert [run_anew(), run_anew()] == [0, 0]


@pytest.mark.parametrize("step", ["mkdir", "write_bytes", "replace"])
def test_where_nothing_can_be_written_kernels_run(
    folder: cache.MachineCodeFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, step: str
) -> None:
    """A file system that is read-only, or full: one log line for all kernels, and no partial files."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os if step == "replace" else Path, step, fail)
    with caplog.at_level(logging.WARNING, "fastllama"):
        assert [run_anew(), run_anew(torch.bfloat16)] == [0, 0]
    (record,) = caplog.records
    assert record.getMessage().startswith("machine code of CPU kernels is not kept, but compiled anew in each process")
    assert "No space left on device" in cache.described()
    assert not folder.path.exists() or files(folder.path) == []


@pytest.mark.parametrize("home", ["a file", "none"])
def test_without_a_home_kernels_run(tmp_path: Path, home: str) -> None:
    (tmp_path / "file").touch()
    # without a HOME, the cache folder is looked for where no folder can be: at /dev/null, were the user unknown
    place = {"XDG_CACHE_HOME": "/dev/null" if home == "none" else None}
    place |= {"HOME": None if home == "none" else str(tmp_path / "file")}
    results, compiled, err = finish(start("float32", **place))
    assert (results, compiled > 0) == ([ONE], True)
    assert err.count("\n") == 1
    assert "not kept" in err


def test_a_user_unknown_to_the_system_has_a_folder_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def expanduser(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", expanduser)
    assert not env.cache_dir().exists()
    with pytest.raises(OSError, match="Not a directory"):
        env.cache_dir().mkdir(parents=True)


def test_sources_that_changed_since_they_were_imported_are_not_kept(
    folder: cache.MachineCodeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels compiled from old sources would be loaded for the new."""
    monkeypatch.setattr(folder, "state", "older")
    run_anew()
    assert not folder.path.exists()
    assert "sources have changed" in cache.described()


def test_without_sources_nothing_is_kept(folder: cache.MachineCodeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def state_of() -> str:
        raise FileNotFoundError("no arithmetic.py")

    monkeypatch.setattr(cache, "state_of", state_of)
    monkeypatch.setattr(cache, "FOLDER", cache.MachineCodeFolder())
    assert [run_anew(), run_anew()] == [0, 0]
    assert cache.described() == "not kept, compiled anew in each process: no arithmetic.py"


def test_functions_of_other_sources_are_not_kept(folder: cache.MachineCodeFolder) -> None:
    """A change of those sources would not change the cache key."""

    def closure() -> Any:
        return SIZE

    closure.__module__ = swiglu.__name__
    assert jit(closure).stats.cache_path is not None
    size = 3
    held = lambda: size  # noqa: E731
    held.__module__ = swiglu.__name__
    assert jit(held).stats.cache_path is None
    assert jit(spoil).stats.cache_path is None


def test_a_kernel_is_compiled_anew_on_request(folder: cache.MachineCodeFolder) -> None:
    run_anew()
    run_anew(torch.bfloat16)
    kernel = jit(swiglu.silu_mul_row_kernel.py_func)
    kernel._cache.disable()
    assert kernel._cache.load_overload((), kernel.targetctx) is None
    kernel._cache.enable()
    kernel.recompile()
    assert files(folder.path) == []
    assert run_anew() == 0


def test_states_unused_for_long_are_removed(folder: cache.MachineCodeFolder) -> None:
    states = folder.path.parent
    for number in range(cache.STATES + 3):
        (states / f"{number:032x}" / "inner").mkdir(parents=True)
        os.utime(states / f"{number:032x}", (number, number))
    (states / "a user's").mkdir()
    os.utime(states / "a user's", (0, 0))
    run_anew()
    kept = [f"{number:032x}" for number in range(4, cache.STATES + 3)]
    assert {path.name for path in states.iterdir()} == {*kept, folder.path.name, "a user's"}


def test_a_state_in_use_is_not_old(folder: cache.MachineCodeFolder) -> None:
    run_anew()
    os.utime(folder.path, (0, 0))
    assert run_anew() == 1
    assert folder.path.stat().st_mtime > 0


def test_numbas_own_settings_are_left_alone() -> None:
    """Other functions of the process keep their cache."""
    code = "import numba, fastllama.kernels.numba.table; print(repr(numba.config.CACHE_DIR))"
    given = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=given)
    assert done.stdout == "''\n", done.stderr
