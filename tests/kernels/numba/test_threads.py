"""Kernels on several threads: each iteration once, bit-identical to one thread, and usable after a failure."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastllama import kernels

pytest.importorskip("numba")
import numpy as np
from numba.core.errors import TypingError

from fastllama.kernels.numba import threads
from fastllama.kernels.numba.numerics import array, jit
from fastllama.kernels.numba.pieces import _COUNT, _GRAIN, _LEFT, FAILED, _get, _set, enter, leave, proceed
from tests.kernels.ops.test_adjust_logits import mixed

ROOT = Path(__file__).parents[3]
MANY = 1 << 40  # of work: worth threads


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every kernel runs with three helpers, in pieces of one iteration."""
    monkeypatch.setattr(threads, "SERIAL_WORK", -1)
    monkeypatch.setattr(threads, "LEAST_PIECE", 1)
    monkeypatch.setattr(threads, "LARGEST_PIECE", 1)
    monkeypatch.setattr(threads.Payoff, "together", True, raising=False)
    monkeypatch.setattr(threads.Payoff, "note", lambda *args: None)
    monkeypatch.setattr(threads, "_teams", [])
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(1)
    threads._retire()


@jit
def count_kernel(region, *args):
    """Each iteration adds one to its own number."""
    numbers_ptr, size = args
    numbers = array(numbers_ptr, (size,), np.int64(0))
    first, last = enter(region, args)
    while first < last:
        for i in range(first, last):
            numbers[i] += 1
        first, last = proceed(region)
    return leave(region)


@jit
def waiting_kernel(region, *args):
    """The first iteration waits for all others; numbers[0] stays 0 if they do not run."""
    numbers_ptr, size, turns = args
    numbers = array(numbers_ptr, (size,), np.int64(0))
    first, last = enter(region, args)
    while first < last:
        for i in range(first, last):
            if i > 0:
                numbers[i] = 1
                continue
            for _ in range(turns):
                done = 0
                for k in range(1, size):
                    done += _get(numbers_ptr, k)
                if done == size - 1:
                    numbers[0] = 1
                    break
        first, last = proceed(region)
    return leave(region)


@jit
def failing_kernel(region, *args):
    """Raises in a helper, or in the caller; the other thread does the iterations."""
    numbers_ptr, size, in_helper = args
    numbers = array(numbers_ptr, (size,), np.int64(0))
    first, last = enter(region, args)
    while first < last:
        for i in range(first, last):
            if (region[3] < 0) == in_helper:
                raise ValueError("an iteration failed")
            turns = 0
            while in_helper and i == 0 and _get(region[0], FAILED) == 0 and turns < 1 << 24:
                turns += 1  # or the caller could do all before a helper wakes
            numbers[i] = 1
        first, last = proceed(region)
    return leave(region)


@jit
def lagging_kernel(region, *args):
    """A helper takes long for an iteration, and the caller leaves it one."""
    numbers_ptr, size = args
    numbers = array(numbers_ptr, (size,), np.int64(0))
    first, last = enter(region, args)
    while first < last:
        for i in range(first, last):
            turns = 0
            if region[3] < 0:
                _set(numbers_ptr, size, 1)  # a helper is there
                while turns < 1 << 24:
                    turns += 1 + 0 * _get(numbers_ptr, i)
            while region[3] >= 0 and i == 0 and _get(numbers_ptr, size) == 0 and turns < 1 << 28:
                turns += 1
            numbers[i] = 1
        first, last = proceed(region)
    return leave(region)


@jit
def idle_kernel(region, *args):
    enter(region, args)
    return leave(region)


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_each_iteration_runs_once(shared: None, count: int) -> None:
    numbers = torch.zeros(count, dtype=torch.int64)
    for times in range(1, 101):
        threads.launch(count_kernel, count, MANY, numbers.data_ptr(), count)
        assert numbers.tolist() == [times] * count


@jit
def proceed_once(region):
    return proceed(region)


def test_a_helper_takes_pieces_of_its_region_only() -> None:
    """It may still hold the arguments of the region before: its writes would go anywhere."""
    state = np.zeros(threads.WORDS, np.int64)
    state[[_LEFT, _COUNT, _GRAIN, threads.PIECES]] = (7 << 32) + 3, 3, 1, 3
    assert proceed_once((state.ctypes.data, 0, 1, -1 - 6)) == (0, 0)
    assert state[_LEFT] == (7 << 32) + 3
    assert proceed_once((state.ctypes.data, 0, 1, -1 - 7)) == (0, 1)
    assert state[_LEFT] == (7 << 32) + 2


def test_regions_in_close_order_do_not_meet(shared: None) -> None:
    some, others = torch.zeros(64, dtype=torch.int64), torch.zeros(64, dtype=torch.int64)
    for times in range(1, 2001):
        threads.launch(count_kernel, 5, MANY, some.data_ptr(), 5)
        threads.launch(count_kernel, 64, MANY, others.data_ptr(), 64)
        assert some.tolist() == [times] * 5 + [0] * 59
        assert others.tolist() == [times] * 64


@pytest.mark.parametrize("grain", [1, 3, 10, 11])
def test_the_last_piece_may_be_smaller(shared: None, grain: int) -> None:
    numbers = torch.zeros(10, dtype=torch.int64)
    assert threads._team().launch(count_kernel, 3, grain, 10, (numbers.data_ptr(), 10))
    assert numbers.tolist() == [1] * 10


def test_a_thread_that_is_held_up_holds_up_its_piece_alone(shared: None) -> None:
    for _ in range(20):  # helpers that are just falling asleep miss a region
        numbers = torch.zeros(40, dtype=torch.int64)
        threads.launch(waiting_kernel, 40, MANY, numbers.data_ptr(), 40, 1 << 20)
        assert numbers.tolist()[1:] == [1] * 39
        if numbers[0]:
            return
    pytest.fail("the first iteration held up the others")


def test_no_caller_waits_for_a_helper_to_begin(shared: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads.Team, "_wake", lambda self, helpers: None)
    numbers = torch.zeros(9, dtype=torch.int64)
    threads.launch(count_kernel, 9, MANY, numbers.data_ptr(), 9)
    assert numbers.tolist() == [1] * 9


def products(rows: int) -> dict[str, Callable[[], Any]]:
    """Matmuls of every weight format, 130 features by 256 columns."""
    x, weight = torch.randn(rows, 256).bfloat16(), torch.randn(130, 256).bfloat16()
    packed, outliers, exponent = kernels.pack_bf12(weight)
    codes4, scales4, _ = kernels.quantize_int4(weight, 64)
    codes8, scales8 = kernels.quantize_int8(weight, 256)
    packed4, packed8 = kernels.pack_int4(codes4), kernels.pack_int8(codes8)
    return {
        f"matmul, {rows}": lambda: kernels.matmul(x, weight),
        f"matmul_bf12, {rows}": lambda: kernels.matmul_bf12(x, packed, outliers, exponent),
        f"matmul_int4, {rows}": lambda: kernels.matmul_int4(x, packed4, scales4),
        f"matmul_int8, {rows}": lambda: kernels.matmul_int8(x, packed8, scales8),
    }


def calls() -> dict[str, Callable[[], Any]]:
    """A call for every kernel that shares its iterations."""
    x, weight, residual = torch.randn(9, 256).bfloat16(), torch.rand(256), torch.randn(9, 256).bfloat16()
    q, pages = torch.randn(6, 4, 32), [torch.randn(5, 2, 16, 32) for _ in range(2)]
    whole = ([[0, 3], [4, 1], [2, 2]], [30, 17, 5], [0, 1, 4, 6])
    table, lengths, bounds = (torch.tensor(each, dtype=torch.int32) for each in whole)
    logits, adjusted = torch.randn(7, 1000), mixed(4, 9000, torch.float32)
    draws = {"temperature": torch.full((7,), 0.8), "top_k": torch.full((7,), 50), "top_p": torch.full((7,), 0.9)}
    draws |= {"min_p": torch.zeros(7), "seed": torch.arange(7), "offset": torch.arange(7)}
    matrix = torch.randn(130, 256).bfloat16()
    return {
        "rms_norm": lambda: kernels.rms_norm(x, weight),
        "add_rms_norm": lambda: kernels.add_rms_norm(x, residual, weight),
        "silu_mul": lambda: kernels.silu_mul(torch.cat([x, residual], 1)),
        "attention_decode": lambda: kernels.attention_decode(q, *pages, table, lengths, return_lse=True),
        "attention_prefill": lambda: kernels.attention_prefill(q, *pages, table, lengths, bounds, return_lse=True),
        "sample": lambda: kernels.sample(logits, **draws),
        "adjust_logits": lambda: kernels.adjust_logits(**adjusted),
        "quantize_int4": lambda: kernels.quantize_int4(matrix, 64)[:2],
        "quantize_int8": lambda: kernels.quantize_int8(matrix, 256),
        "pack_int4": lambda: kernels.pack_int4(kernels.quantize_int4(matrix, 64)[0]),
        "pack_int8": lambda: kernels.pack_int8(kernels.quantize_int8(matrix, 256)[0]),
        "pack_bf12": lambda: kernels.pack_bf12(matrix)[:2],
        **products(1),
        **products(5),
        **products(40),
    }


def test_threads_do_not_change_a_bit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = {name: (call, flat(call())) for name, call in calls().items()}
    request.getfixturevalue("shared")
    shared, launch = set(), threads.Team.launch

    def noted(self: threads.Team, kernel: Any, *args: Any) -> bool:
        shared.add((kernel.__module__, kernel.__name__))
        return launch(self, kernel, *args)

    monkeypatch.setattr(threads.Team, "launch", noted)
    for name, (call, results) in alone.items():
        for _ in range(20):
            for one, other in zip(results, flat(call()), strict=True):
                assert torch.equal(one, other), name
    sources = (ROOT / "fastllama" / "kernels" / "numba").glob("*.py")
    written = {
        (f"fastllama.kernels.numba.{path.stem}", name)
        for path in sources
        for name in re.findall(r"^def (\w+)\(region, \*args\)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert shared == written


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def test_callers_at_once_do_not_meet(shared: None) -> None:
    """The helpers serve one caller at a time; the others go on alone."""

    def call(_: int) -> list[int]:
        numbers = torch.zeros(50, dtype=torch.int64)
        torch.set_num_threads(4)  # of this thread
        for _ in range(50):
            threads.launch(count_kernel, 50, MANY, numbers.data_ptr(), 50)
        return numbers.tolist()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(call, range(16))) == [[50] * 50] * 16


@pytest.mark.parametrize(("in_helper", "error"), [(False, ValueError), (True, MemoryError)])
def test_a_kernel_that_fails_leaves_the_next_alone(shared: None, in_helper: bool, error: type[Exception]) -> None:
    def call() -> None:
        for _ in range(50):  # helpers that are just falling asleep miss a region
            threads.launch(failing_kernel, 30, MANY, numbers.data_ptr(), 30, in_helper)

    for _ in range(5):
        numbers = torch.zeros(31, dtype=torch.int64)
        with pytest.raises(error):
            call()
        threads.launch(count_kernel, 30, MANY, numbers.zero_().data_ptr(), 30)
        assert numbers.tolist() == [1] * 30 + [0]


def test_an_interrupt_waits_for_the_helpers(shared: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that helpers write to must not be freed before they end."""
    sleep, interrupts = threads.time.sleep, iter([KeyboardInterrupt()])

    def nap(seconds: float) -> None:
        for interrupt in interrupts:
            raise interrupt
        sleep(seconds)

    monkeypatch.setattr(threads.time, "sleep", nap)
    monkeypatch.setattr(threads, "END_PATIENCE", 0.0)
    numbers = torch.zeros(21, dtype=torch.int64)

    def call() -> None:
        for _ in range(50):  # the caller may have been away until the helpers had done all
            threads.launch(lagging_kernel, 20, MANY, numbers.zero_().data_ptr(), 20)

    with pytest.raises(KeyboardInterrupt):
        call()
    assert numbers.tolist() == [1] * 21
    threads.launch(count_kernel, 20, MANY, numbers.zero_().data_ptr(), 20)
    assert numbers.tolist() == [1] * 20 + [0]


def test_arrays_are_refused(shared: None) -> None:
    """The last thread to leave the kernel would free an array, and that may be a helper."""
    with pytest.raises(TypingError, match=r"argument of type array.*legal: numbers, addresses"):
        threads.launch(idle_kernel, 3, MANY, np.zeros(3, np.int64))


def test_as_many_threads_as_torch_has(shared: None) -> None:
    before = set(threading.enumerate())
    numbers = torch.zeros(5, dtype=torch.int64)
    torch.set_num_threads(1)
    threads.launch(count_kernel, 5, MANY, numbers.data_ptr(), 5)
    assert not threads._teams
    torch.set_num_threads(3)
    threads.launch(count_kernel, 5, MANY, numbers.data_ptr(), 5)
    assert {each.name for each in set(threading.enumerate()) - before} == {"fastllama-0", "fastllama-1"}
    assert threads._team()._helpers == 2
    torch.set_num_threads(2)
    threads.launch(count_kernel, 5, MANY, numbers.data_ptr(), 5)
    assert threads._team()._state[threads.HELPERS] == 1


class NotedWork(TorchDispatchMode):
    """Notes what torch computes of so many elements that it wakes its threads."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "empty" not in str(func) and not func.is_view and isinstance(result, Tensor) and result.numel() > 1 << 15:
            self.found.append(str(func))
        return result


def test_torchs_threads_are_left_asleep() -> None:
    """They spin for milliseconds after each of its ops, on the cores that a kernel's helpers need."""
    x, weight = torch.randn(32, 2048).bfloat16(), (torch.randn(2048, 2048) / 45).bfloat16()
    given = {"norm": torch.rand(2048), "residual": torch.randn(32, 2048).bfloat16()}
    codes, scales = kernels.quantize_int8(weight, 2048)
    packed = kernels.pack_int8(codes)
    q, pages = torch.randn(64, 32, 64), [torch.randn(4, 4, 16, 64) for _ in range(2)]
    table, bounds = torch.arange(4, dtype=torch.int32)[None], torch.tensor([0, 64], dtype=torch.int32)
    with NotedWork() as noted:
        product = kernels.matmul(x, weight, **given)
        kernels.matmul_int8(x, packed, scales, **given)
        kernels.attention_prefill(q, *pages, table, bounds[1:], bounds)
    assert noted.found == []
    expected = kernels.reference.matmul(x.double(), weight.double(), **{k: v.double() for k, v in given.items()})
    torch.testing.assert_close(product.double(), expected, rtol=2e-2, atol=2e-2)


def in_a_process(code: str) -> SimpleNamespace:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    return SimpleNamespace(status=done.returncode, out=done.stdout, err=done.stderr)


LARGE = """
import torch
from fastllama import kernels
torch.set_num_threads({threads})
x, weight = torch.ones(1, 1024), torch.ones(4096, 1024)
def call(*_):
    for _ in range(200):
        assert (kernels.matmul(x, weight) == 1024).all()
call()
"""


def test_torchs_number_of_threads_stays_as_it_is() -> None:
    done = in_a_process(LARGE.format(threads=3) + "print(torch.get_num_threads())")
    assert (done.status, done.out, done.err) == (0, "3\n", "")


@pytest.mark.skipif(not hasattr(threads.os, "fork"), reason="no fork on this system")
def test_a_forked_process_begins_alone_and_has_helpers_of_its_own_where_it_asks() -> None:
    code = """
import os, threading, warnings
warnings.simplefilter("ignore")  # of Python 3.12, for it finds threads
if not (child := os.fork()):
    for threads in (torch.get_num_threads(), 3):
        call(torch.set_num_threads(threads))
        print(threads, sum(each.name.startswith("fastllama") for each in threading.enumerate()), flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
call()
"""
    done = in_a_process(LARGE.format(threads=3) + code)
    assert (done.status, done.out, done.err) == (0, "1 0\n3 2\n", "")
