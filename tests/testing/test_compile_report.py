"""Compile reports of small kernels with one known property each: it is reported, on every target."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastllama.testing import compile_report as module
from fastllama.testing import triton_api
from fastllama.testing.compile_report import CACHE, CODE, REPORT, compile_report, machine_code_of, main, table
from fastllama.testing.recorder import record
from fastllama.testing.resources import KernelReport
from fastllama.testing.targets import TARGETS
from tests.testing import toys

pytestmark = pytest.mark.compile

ROOT = Path(__file__).parents[2]
KEPT = ROOT / CACHE
NVIDIA = [name for name in TARGETS if name.startswith("sm_")]

each_target = pytest.mark.parametrize("target", TARGETS)


def report(function: toys.Launcher, target: str) -> KernelReport:
    (found,) = compile_report(function, [target], KEPT)
    return found


def kept(folder: Path) -> int:
    """How many launches are in a cache of reports."""
    reports, code = ({path.name.split(".")[0] for path in folder.glob(f"*{end}")} for end in (REPORT, CODE))
    assert reports == code
    return len(reports)


@each_target
def test_a_clean_kernel(target: str) -> None:
    """2048 elements of 16 bits are 16 for each of 128 threads: two loads and two stores of 128 bits; on AMD half."""
    accesses = 2 if target in NVIDIA else 1
    found = report(toys.copy, target)
    assert found.problems(128) == []
    assert (found.num_warps, found.spilled_bytes, found.stack_bytes, found.shared_bytes) == (4, 0, 0, 0)
    assert (found.program.loads, found.program.stores) == ({"128": accesses}, {"128": accesses})
    assert 0 < found.registers < 64
    assert found.hot is found.program
    assert found.hot.instructions_per_byte == found.program.instructions / (32 * accesses)
    assert (found.hot.matrix, found.loops) == ({}, ())


@each_target
def test_misaligned_pointers_are_narrow_accesses(target: str) -> None:
    """A program without loops is judged as a whole."""
    found = report(toys.copy_misaligned, target)
    count = 16 if target in NVIDIA else 8
    assert found.problems() == [
        f"global accesses narrower than 32 bits in a program without loops: {count} x load 16, {count} x store 16"
    ]
    assert found.problems(besides={"load 16": count, "store 16": count}) == []
    assert found.problems(besides={"load 16": count, "store 16": count - 1}) == [
        f"global accesses narrower than 32 bits in a program without loops: {count} x store 16"
    ]
    assert found.problems(16) == []


@each_target
def test_a_kernel_that_spills(target: str) -> None:
    found = report(toys.spilling, target)
    assert found.spilled_bytes > 0
    assert found.problems() == [f"{found.spilled_bytes} bytes a thread are spilled"]
    assert found.occupancy.limiter == "registers"


@each_target
def test_narrow_loads_in_a_loop(target: str) -> None:
    """The store after the loop is narrow too, and costs nothing."""
    found = report(toys.narrow, target)
    assert set(found.narrow()) == {"load 16"}
    (problem,) = found.problems()
    assert problem == f"global accesses narrower than 32 bits in a loop: {found.narrow()['load 16']} x load 16"
    assert report(toys.wide, target).problems() == []
    assert report(toys.wide, target).hot.stores == {}


@each_target
def test_more_shared_memory_than_there_is(target: str) -> None:
    """Six stages of two tiles of 32 KiB, less the stage in registers: the compiler accepts it, a launch would fail."""
    found = report(toys.over_the_limit, target)
    assert found.shared_bytes >= 5 * 2 * 32 * 1024
    assert found.problems() == [
        f"{found.shared_bytes} bytes of shared memory, and a block may take {TARGETS[target].shared_per_block}"
    ]
    assert (found.occupancy.blocks, found.occupancy.limiter) == (0, "shared memory")


@pytest.mark.parametrize(
    ("target", "kind"),
    {"sm_80": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "MFMA"}.items(),
)
def test_tensor_cores(target: str, kind: str) -> None:
    """Tiles of 64 x 64 halves are 64 bytes a thread for each operand, which NVIDIA copies without registers."""
    found = report(toys.dot, target)
    assert found.problems() == []
    assert list(found.hot.matrix) == [kind]
    assert len(found.loops) == 1
    assert found.hot.bytes_moved == (128 if target in NVIDIA else 64)
    assert found.hot.loads == ({"async 128": 8} if target in NVIDIA else {"128": 4})


def test_ptxas_warns() -> None:
    found = report(toys.serialised, "sm_90")
    assert any("wgmma.mma_async instructions are serialized" in warning for warning in found.warnings)
    assert set(found.warnings) <= set(found.problems())


@each_target
def test_a_kernel_that_does_not_compile(target: str) -> None:
    found = report(toys.broken, target)
    assert found.problems() == ["does not compile: CompilationError: arange's range must be a power of 2"]
    assert table([found]).splitlines()[-1] == f"  {target}: {found.error}"


def test_one_function_may_launch_several_kernels() -> None:
    found = compile_report(lambda: (toys.copy(), toys.wide(), toys.copy()), ["sm_80", "gfx942"], KEPT)
    assert [(each.launch.split("(")[0], each.target) for each in found] == [
        ("copy_kernel", "sm_80"),
        ("copy_kernel", "gfx942"),
        ("row_sum_kernel", "sm_80"),
        ("row_sum_kernel", "gfx942"),
    ]


def test_without_the_tools_of_nvidia(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What can be compiled is; the rest reports what is missing, and is not cached as a report."""

    def none_here(*arch: int) -> None:
        raise RuntimeError("Cannot find ptxas")

    monkeypatch.setattr(triton_api.nvidia, "get_ptxas", none_here)
    amd, nvidia = compile_report(toys.copy, ["gfx942", "sm_90"], tmp_path)
    assert amd.problems() == []
    (problem,) = nvidia.problems()
    assert problem.startswith("cannot be compiled here: Cannot find ptxas in ")
    assert problem.endswith("The wheel on PyPI does; AMD targets need none")
    assert kept(tmp_path) == 1


def test_reports_are_kept_by_content(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = compile_report(toys.copy, ["gfx942"], tmp_path)
    compiled = []
    stock = module.compile_launch
    monkeypatch.setattr(module, "compile_launch", lambda launch: compiled.append(str(launch)) or stock(launch))
    assert compile_report(toys.copy, ["gfx942"], tmp_path) == first
    assert compiled == []
    compile_report(toys.copy_misaligned, ["gfx942"], tmp_path)
    monkeypatch.setattr(triton_api, "compiler_state", lambda: "another version")
    compile_report(toys.copy, ["gfx942"], tmp_path)
    assert len(compiled) == 2
    compile_report(toys.copy, ["gfx942"], None)
    assert (len(compiled), kept(tmp_path)) == (3, 3)


def test_machine_code_is_kept_with_the_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with record(TARGETS["gfx942"]) as launches:
        toys.copy()
    compile_report(toys.copy, ["gfx942"], tmp_path)
    fresh = machine_code_of(launches[0], cache=None)
    monkeypatch.setattr(module, "compile_launch", None)
    assert machine_code_of(launches[0], tmp_path) == fresh
    assert "buffer_load" in fresh


def test_what_does_not_compile_has_no_machine_code(tmp_path: Path) -> None:
    with record(TARGETS["gfx942"]) as launches:
        toys.broken()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^does not compile: CompilationError"):
            machine_code_of(launches[0], tmp_path)


def test_nothing_launched() -> None:
    with pytest.raises(ValueError, match=r"^the function launched no Triton kernel$"):
        compile_report(toys.nothing, cache=None)


class TestCommand:
    def test_table(self, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["tests.testing.toys:wide", "--targets", "sm_90,gfx942", "--cache", str(KEPT)]
        assert main(arguments) == 0
        launch, heads, *rows = capsys.readouterr().out.splitlines()
        assert launch == (
            "row_sum_kernel(out_ptr: *fp32 % 16, x_ptr: *fp16 % 16, row_stride: i32 % 16, n: i32 % 16, BLOCK=1024)"
        )
        assert heads.split()[:3] == ["target", "warps", "stages"]
        assert [row.split()[:3] for row in rows] == [["sm_90", "4", "3"], ["gfx942", "4", "2"]]
        assert rows[0].index("4x128") == heads.index("loads")

    def test_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        """The exit status is 1 where there is a problem."""
        assert main(["tests.testing.toys:narrow", "--targets", "sm_80", "--json", "--cache", str(KEPT)]) == 1
        (found,) = json.loads(capsys.readouterr().out)
        assert found["problems"] == report(toys.narrow, "sm_80").problems()
        assert found.pop("problems")
        assert KernelReport.from_json(found) == report(toys.narrow, "sm_80")

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            ("toys", "function is 'toys'; legal: module:function"),
            ("tests.testing.toys:cpy", "module tests.testing.toys has no function 'cpy'"),
            ("no_such_module:f", "No module named 'no_such_module'"),
            ("tests.testing.toys:nothing", "the function launched no Triton kernel"),
        ],
    )
    def test_errors(self, capsys: pytest.CaptureFixture[str], function: str, message: str) -> None:
        with pytest.raises(SystemExit, match="2"):
            main([function])
        assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: {message}")

    def test_as_a_module(self, tmp_path: Path) -> None:
        """A user's file in the working directory."""
        lines = (ROOT / "tests" / "testing" / "toys.py").read_text(encoding="utf-8")
        (tmp_path / "mine.py").write_text(lines, encoding="utf-8")
        command = [sys.executable, "-m", "fastllama.testing.compile_report", "mine:copy", "--targets", "gfx942"]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert "gfx942" in done.stdout
        assert kept(tmp_path / CACHE) == 1
