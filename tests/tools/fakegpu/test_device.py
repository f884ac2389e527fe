"""The real torch and the real Triton take the fake GPU for an H100: memory, launches and their limits."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tools.fakegpu.conftest import Program

pytestmark = pytest.mark.fakegpu

KERNELS = """
import torch, triton, triton.language as tl

@triton.jit
def row_kernel(out_ptr, x_ptr, n, BLOCK: tl.constexpr):
    col = tl.arange(0, BLOCK)
    tl.store(out_ptr + col, tl.load(x_ptr + col, mask=col < n) + 1, mask=col < n)

x = torch.empty(64, device="cuda")
"""


@pytest.fixture
def kernels(tmp_path: Path) -> str:
    """Source that defines a kernel, in a file of its own: Triton reads a kernel's text there."""
    (tmp_path / "kernels.py").write_text(KERNELS, encoding="utf-8")
    return f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom kernels import *\n"


def test_memory_is_that_of_the_device_and_takes_none_of_the_host(program: Program) -> None:
    source = """
import resource, torch
large = torch.empty(70 << 30, dtype=torch.uint8, device="cuda").zero_()
print(torch.cuda.mem_get_info()[0] >> 30, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 << 20)
try:
    torch.empty(10 << 30, dtype=torch.uint8, device="cuda")
except torch.OutOfMemoryError:
    print("full")
"""
    found, log = program(source)
    assert found.split() == ["8", "True", "full"]
    assert not log.violations


def test_what_the_host_has_sent_it_gets_back(program: Program) -> None:
    source = """
import torch
x = torch.tensor([3, 5]).cuda()
print(x.tolist(), x[:1].tolist(), (x + x).tolist())
"""
    assert program(source)[0] == "[3, 5] [0] [0, 0]\n"


def test_what_is_read_back_is_zeros(program: Program) -> None:
    found, _ = program("import torch; x = torch.ones(3).cuda(); print((x + x).tolist(), x.sum().item(), x.nonzero())")
    assert found.startswith("[0.0, 0.0, 0.0] 0.0 tensor([], device='cuda:0', size=(0, 1)")


def test_comparisons_look_at_shapes_and_dtypes_alone(program: Program) -> None:
    source = """
import torch
x = torch.ones(3).cuda()
print(torch.equal(x, x + 1), torch.equal(x, x[:2]), torch.equal(x, x.half()), bool(x.isfinite().all()))
torch.testing.assert_close(x, x + 1)
for other in (x[:2], x.half()):
    try:
        torch.testing.assert_close(x, other)
    except AssertionError as error:
        print("not like" in str(error))
print(torch.equal(torch.ones(2), torch.zeros(2)))
"""
    assert program(source)[0].split() == ["True", "False", "False", "True", "True", "True", "False"]


def test_a_launch_and_whether_it_overlaps(program: Program, kernels: str) -> None:
    found, log = program(
        kernels
        + """
for pdl in (False, True):
    kernel = row_kernel[(1,)](x, x, 64, BLOCK=64, launch_pdl=pdl)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    for pdl in (False, True, True):
        row_kernel[(1,)](x, x, 64, BLOCK=64, launch_pdl=pdl)
    x + 1
graph.replay()
print(kernel.n_regs)
"""
    )
    assert not log.violations
    assert log.captures == [(4, 2)]
    assert log.replays == 1
    assert log.launches["row_kernel"] == 5
    assert int(found) > 0  # registers of a thread, read from the cubin


def test_a_kernel_that_is_first_launched_in_a_capture(program: Program, kernels: str) -> None:
    """Loading the kernel is not allowed during a capture."""
    source = """
try:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        row_kernel[(1,)](x, x, 64, BLOCK=64)
except RuntimeError as error:
    print(error)
"""
    found, log = program(kernels + source)
    assert "previous error during capture" in found
    assert list(log.violations) == ["cuModuleLoadData while a stream is captured"]


@pytest.mark.parametrize(
    ("launch", "why"),
    [
        ("row_kernel[(1, 65536)](x, x, 64, BLOCK=64)", "a grid out of range"),
        ("row_kernel[(1, 1, 65536)](x, x, 64, BLOCK=64)", "a grid out of range"),
        ("driver(grid=(0, 1, 1))", "a grid out of range"),
        ("driver(threads=2048)", "a block out of range"),
        ("driver(shared=48 * 1024 + 1)", "more shared memory than the kernel may take"),
        ("allow(227 * 1024); driver(shared=227 * 1024 + 1)", "more shared memory than the kernel may take"),
    ],
)
def test_limits_of_a_launch(program: Program, kernels: str, launch: str, why: str) -> None:
    """Errors that a GPU reports at the next synchronization, or never, are reported at once."""
    source = """
import ctypes
cuda = ctypes.CDLL("libcudart.so.13")
function, module = ctypes.c_void_p(), ctypes.c_void_p()
assert cuda.cuModuleLoadData(ctypes.byref(module), bytes(64)) == 0
assert cuda.cuModuleGetFunction(ctypes.byref(function), module, b"empty") == 0
def driver(grid=(1, 1, 1), threads=32, shared=0):
    if cuda.cuLaunchKernel(function, *grid, threads, 1, 1, shared, None, None, None): raise RuntimeError("refused")
def allow(shared): assert cuda.cuFuncSetAttribute(function, 8, shared) == 0
"""
    refused = f"try:\n    {launch}\nexcept RuntimeError: pass\nelse: raise SystemExit(3)"
    _, log = program(f"{kernels}{source}driver()\n{refused}")
    assert [why in violation for violation in log.violations] == [True]


def test_more_registers_than_a_block_may_take(program: Program, kernels: str) -> None:
    """A cubin holds the registers per thread; ptxas was given a block's threads, and this launch has more."""
    source = """
import ctypes
compiled = row_kernel.warmup(x, x, 64, BLOCK=64, num_warps=1, grid=(1,))
compiled._init_handles()
cuda = ctypes.CDLL("libcudart.so.13")
cubin = bytearray(compiled.asm["cubin"])
place = cubin.index(bytes((4, 0x2F, 8, 0)))
cubin[place + 8 : place + 12] = (255).to_bytes(4, "little")
function, module = ctypes.c_void_p(), ctypes.c_void_p()
assert cuda.cuModuleLoadData(ctypes.byref(module), bytes(cubin)) == 0
assert cuda.cuModuleGetFunction(ctypes.byref(function), module, b"many_registers") == 0
values = (ctypes.c_void_p * 8)(*[ctypes.addressof(ctypes.c_uint64())] * 8)
for threads in (256, 288):
    print(cuda.cuLaunchKernel(function, 1, 1, 1, threads, 1, 1, 0, None, None, None))
"""
    found, log = program(kernels + source)
    assert found.split() == ["0", "9"]
    assert "more registers than a block may take" in next(iter(log.violations))


def test_an_address_of_freed_memory(program: Program, kernels: str) -> None:
    """As a launch would use it that goes on with addresses from before."""
    source = """
kernel = row_kernel[(1,)](x, x, 64, BLOCK=64)
large = torch.empty(64 << 20, device="cuda")
address = large.data_ptr()
kernel[(1, 1, 1)](address, address, 64, 64)
del large
torch.cuda.empty_cache()
try:
    kernel[(1, 1, 1)](address, address, 64, 64)
except RuntimeError as error:
    print(error)
"""
    found, log = program(kernels + source)
    assert "illegal memory access" in found
    assert "freed memory" in next(iter(log.violations))


def test_torch_refuses_what_a_capture_forbids(program: Program) -> None:
    """torch reads `.item()` while it captures: refused, and the error gives the reason."""
    source = """
import torch
x = torch.ones(3, device="cuda")
try:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.sum().item()
except Exception as error:
    print(error)
"""
    found, log = program(source)
    assert "captur" in found
    assert log.violations
