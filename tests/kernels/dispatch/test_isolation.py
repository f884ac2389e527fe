"""Autocast and reduced matmul precision are off within an op and restored after, in threads and forks too."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable

import pytest
import torch

from fastllama.kernels.dispatch import isolation
from fastllama.kernels.dispatch.isolation import autocast_enabled, full_precision, in_full_precision, no_autocast
from tests.torch_settings import SETTINGS, default_settings

PRECISIONS = [name for name in SETTINGS if "precision" in name]
X, WEIGHT = torch.randn(64, 256), torch.randn(96, 256)
has_backends = pytest.mark.skipif(not isolation._BACKENDS, reason="torch 2.9 brought a precision for each backend")


def precisions() -> tuple[str, ...]:
    """The current settings, defaults or not."""
    places = (
        [(backend, op) for backend in ("mkldnn", "cuda") for op in ("all", "matmul")] if isolation._BACKENDS else []
    )
    return tuple(torch._C._get_fp32_precision_getter(*place) for place in places)


def test_autocast_is_off_within() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert [autocast_enabled(device) for device in ("cpu", "cuda", "meta")] == [True, False, False]
        with no_autocast():
            assert (X @ WEIGHT.T).dtype == torch.float32
        assert (X @ WEIGHT.T).dtype == torch.bfloat16
    assert not autocast_enabled("cpu")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", PRECISIONS)
def test_precision_is_full_within_and_put_back(name: str, device: str) -> None:
    expected = X @ WEIGHT.T
    with warnings.catch_warnings(), SETTINGS[name]():
        warnings.simplefilter("error")
        before = default_settings(), precisions()
        with full_precision(device), full_precision(device):
            assert torch.equal(X @ WEIGHT.T, expected)
            assert isolation._read() in isolation._full_here
            assert device == "cpu" or isolation._is_full_on_gpu()
        assert (default_settings(), precisions()) == before


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cublas_adds_in_fp32_within(device: str) -> None:
    """Rounding sums to 16 bits is allowed by default."""
    before = [read() for read, _ in isolation._REDUCTIONS]
    assert any(map(isolation._reduces, before))
    with full_precision(device):
        assert any(isolation._reduces(read()) for read, _ in isolation._REDUCTIONS) == (device == "cpu")
    assert [read() for read, _ in isolation._REDUCTIONS] == before


@has_backends
def test_what_a_backend_inherits_it_inherits_again() -> None:
    with SETTINGS["fp32_precision bf16"](), full_precision("cpu"):
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    with SETTINGS["fp32_precision tf32"]():
        assert torch.backends.mkldnn.matmul.fp32_precision == "tf32"


def test_where_nothing_is_set_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "_set_full", pytest.fail)
    with full_precision("cpu"):
        assert in_full_precision(torch.add)(1, 2) == 3


def test_an_exception_puts_back() -> None:
    with SETTINGS["matmul precision medium"]():
        with pytest.raises(ZeroDivisionError), full_precision("cpu"):
            raise ZeroDivisionError
        assert torch.get_float32_matmul_precision() == "medium"


def run_together(*tasks: Callable[[], None]) -> None:
    raised: list[BaseException] = []

    def safely(task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=safely, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert raised == []


def test_the_last_thread_out_puts_back() -> None:
    """A thread that entered later stays in full precision when the first has left."""
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))
    expected = X @ WEIGHT.T

    def first() -> None:
        with full_precision("cpu"):
            first_is_in.set()
            assert second_is_in.wait(60)
        first_is_out.set()

    def second() -> None:
        assert first_is_in.wait(60)
        with full_precision("cpu"):  # full already, set by the first thread
            second_is_in.set()
            assert first_is_out.wait(60)
            assert torch.equal(X @ WEIGHT.T, expected)

    with SETTINGS["matmul precision medium"]():
        run_together(first, second)
        assert torch.get_float32_matmul_precision() == "medium"


def test_threads_that_come_and_go() -> None:
    expected = X @ WEIGHT.T

    def often() -> None:
        for _ in range(300):
            assert torch.equal(in_full_precision(torch.mm)(X, WEIGHT.T), expected)

    with SETTINGS["matmul precision medium"]():
        run_together(*[often] * 4)
        assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_has_what_its_parent_had_set() -> None:
    """Though the thread that would restore it does not exist in the child."""
    inside, forked = threading.Event(), threading.Event()

    def stay() -> None:
        with full_precision("cpu"):
            inside.set()
            assert forked.wait(60)

    with SETTINGS["matmul precision medium"]():
        thread = threading.Thread(target=stay)
        thread.start()
        assert inside.wait(60)
        child = os.fork()
        if not child:
            good = torch.get_float32_matmul_precision() == "medium"
            with full_precision("cpu"):
                good = good and torch.get_float32_matmul_precision() == "highest"
            os._exit(0 if good and torch.get_float32_matmul_precision() == "medium" else 1)
        forked.set()
        thread.join(60)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert torch.get_float32_matmul_precision() == "medium"
