"""Recording: what launchers would compile, with nothing compiled and no GPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime import driver

from fastllama.testing.recorder import Launch, record
from fastllama.testing.targets import TARGETS
from tests.testing.toys import copy_kernel

pytestmark = pytest.mark.compile

SM_90, GFX942 = TARGETS["sm_90"], TARGETS["gfx942"]


def recorded(launch: Callable[[], Any]) -> list[Launch]:
    with record(SM_90) as launches:
        launch()
    return launches


def copied(out: Tensor, x: Tensor, n: int, **options: int) -> str:
    (launch,) = recorded(lambda: copy_kernel[(1,)](out_ptr=out, x_ptr=x, n=n, BLOCK=64, **options))
    return str(launch)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_launch_code_decides_what_is_specialised(device: str) -> None:
    x = torch.empty(64, dtype=torch.bfloat16, device=device)
    wide = "copy_kernel(out_ptr: *bf16 % 16, x_ptr: *bf16 % 16, n: i32 % 16, BLOCK=64)"
    assert copied(x, x, 64) == wide
    assert copied(x, x, 63) == wide.replace("n: i32 % 16", "n: i32")
    assert copied(x, x, 1) == wide.replace("n: i32 % 16", "n=1")
    assert copied(x[1:], x, 64) == wide.replace("out_ptr: *bf16 % 16", "out_ptr: *bf16")
    assert copied(x[8:], x, 64) == wide
    assert copied(x, x, 1 << 40) == wide.replace("i32", "i64")


def test_fake_tensors_on_a_gpu_that_is_not_here() -> None:
    with FakeTensorMode():
        x, y = torch.empty(64, dtype=torch.float16, device="cuda"), torch.empty(64, dtype=torch.float16)
        found = copied(y[3:], x, 7)
    assert found == "copy_kernel(out_ptr: *fp16, x_ptr: *fp16 % 16, n: i32, BLOCK=64)"


def test_amd_knows_whether_32_bits_reach_every_element() -> None:
    def hints(x: Tensor) -> list[Any]:
        with record(GFX942) as launches:
            copy_kernel[(1,)](out_ptr=x, x_ptr=x, n=16, BLOCK=64)
        return launches[0].source.attrs[0,]

    for mode, device in ((FakeTensorMode(), "cuda"), (nullcontext(), "meta")):
        with mode:
            assert ["tt.pointer_range", 32] in hints(torch.empty(1 << 30, dtype=torch.int8, device=device))
            assert ["tt.pointer_range", 32] not in hints(torch.empty(1 << 31, dtype=torch.int8, device=device))


def test_options_are_those_of_the_target() -> None:
    x = torch.empty(64)
    for target, stages in (("sm_90", 3), ("gfx942", 2)):
        with record(TARGETS[target]) as launches:
            copy_kernel[(1,)](out_ptr=x, x_ptr=x, n=64, BLOCK=64, num_warps=2)
        (found,) = launches
        assert (found.options["num_warps"], found.options["num_stages"], found.target.name) == (2, stages, target)


def test_the_launch_code_may_ask_the_driver() -> None:
    found = []

    def ask() -> None:
        properties = driver.active.utils.get_device_properties(driver.active.get_current_device())
        found.append((driver.active.get_current_target().arch, properties["multiprocessor_count"]))
        driver.active.get_benchmarker()

    with pytest.raises(RuntimeError, match=r"needs 'get_benchmarker' of the driver, and there is no GPU"):
        recorded(ask)
    assert found == [(90, 132)]


@triton.autotune([triton.Config({"BLOCK": 64}, num_warps=2), triton.Config({"BLOCK": 128}, num_warps=4)], key=["n"])
@triton.heuristics({"EVEN": lambda given: given["n"] % given["BLOCK"] == 0})
@triton.jit
def tuned_kernel(x_ptr, n, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(x_ptr + offsets, offsets, mask=offsets < n)


def test_every_configuration_of_an_autotuned_kernel() -> None:
    x = torch.empty(64, dtype=torch.int32)
    found = recorded(lambda: tuned_kernel[lambda meta: (triton.cdiv(64, meta["BLOCK"]),)](x, 64))
    assert [str(launch).partition(", ")[2] for launch in found] == [
        "n: i32 % 16, BLOCK=64, EVEN=True)",
        "n: i32 % 16, BLOCK=128, EVEN=False)",
    ]
    assert [launch.options["num_warps"] for launch in found] == [2, 4]


def test_everything_is_put_back() -> None:
    """Even where the launcher raises."""
    run, active, compiler = copy_kernel.run, driver._active, triton.compile
    known = {device: dict(kernels) for device, (kernels, *_) in copy_kernel.device_caches.items()}
    x = torch.empty(64)

    def launch_and_fail() -> None:
        copy_kernel[(1,)](out_ptr=x, x_ptr=x, n=64, BLOCK=64)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        recorded(launch_and_fail)
    assert (copy_kernel.run, driver._active, copy_kernel.compile) == (run, active, compiler)
    found = {device: kernels for device, (kernels, *_) in copy_kernel.device_caches.items()}
    assert found == {f"FakeDriver {SM_90.name}": {}} | known


def test_a_wrong_argument_is_the_launch_codes_own_error() -> None:
    with pytest.raises(TypeError, match="n"):
        recorded(lambda: copy_kernel[(1,)](torch.empty(4), torch.empty(4), BLOCK=64))


def test_interpreted_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match=r"^TRITON_INTERPRET is set, so kernels are interpreted; record"):
        recorded(lambda: None)
