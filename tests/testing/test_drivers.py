"""Fake drivers: launches for GPUs that are not installed."""

from __future__ import annotations

import pytest
import torch
from triton.runtime import driver

from fastllama.testing.drivers import DryLaunch, FakeDriver, dry_run
from fastllama.testing.targets import TARGETS
from tests.testing.toys import copy_kernel

pytestmark = pytest.mark.compile

SM_90 = TARGETS["sm_90"]


def test_what_a_gpu_would_get() -> None:
    out, x = torch.zeros(64), torch.ones(64)
    with dry_run(SM_90) as launches:
        copy_kernel[(2,)](out_ptr=out, x_ptr=x, n=64, BLOCK=1024)
        copy_kernel[2, 1, 3](out, x, 63, BLOCK=1024)
        copy_kernel[lambda given: (given["n"],)](out_ptr=out[1:], x_ptr=x, n=48, BLOCK=1024)
    aligned, odd, misaligned = launches
    assert aligned == DryLaunch(aligned.binary, (2, 1, 1), (out.data_ptr(), x.data_ptr(), 64, 1024))
    assert odd == DryLaunch(odd.binary, (2, 1, 3), (out.data_ptr(), x.data_ptr(), 63, 1024))
    assert misaligned.grid == (48, 1, 1)
    assert all(launch.binary.startswith(b"\x7fELF") for launch in launches)
    assert len({launch.binary for launch in launches}) == 3  # each specialised differently
    assert out.eq(0).all()


def test_the_driver_before_is_back_after_an_error() -> None:
    before = driver._active
    with pytest.raises(ZeroDivisionError), dry_run(SM_90):
        raise ZeroDivisionError
    assert driver._active is before


def test_other_questions_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"^the launcher needs 'get_benchmarker' of the driver, and there is no"):
        FakeDriver(SM_90).get_benchmarker()
