"""The fake GPU refuses what CUDA refuses while a stream is captured, mode by mode and thread by thread.

Source: CUDA runtime API, cudaStreamBeginCapture and cudaThreadExchangeStreamCaptureMode.
"""

from __future__ import annotations

import pytest

from tests.tools.fakegpu.conftest import Program

pytestmark = pytest.mark.fakegpu

CUDA = """
import ctypes, threading
cuda = ctypes.CDLL("libcudart.so.13")
cuda.fakegpu_step.restype = None
GLOBAL, THREAD_LOCAL, RELAXED = range(3)
UNSUPPORTED, INVALIDATED, UNJOINED, ISOLATION, CAPTURED, WRONG_THREAD = 900, 901, 904, 905, 907, 908
def made(create, *rest):
    found = ctypes.c_void_p()
    assert create(ctypes.byref(found), *rest) == 0
    return found
def stream(): return made(cuda.cudaStreamCreateWithPriority, 1, 0)
def event(): return made(cuda.cudaEventCreate)
def malloc(size=64): return cuda.cudaMalloc(ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(size))
def begin(on, mode=GLOBAL): assert cuda.cudaStreamBeginCapture(on, mode) == 0
def end(on):
    graph = ctypes.c_void_p()
    return cuda.cudaStreamEndCapture(on, ctypes.byref(graph)), graph.value is not None
def in_thread(call):
    found = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start(); thread.join()
    return found[0]
def memset(on):
    block = made(cuda.cudaMalloc, ctypes.c_size_t(64))
    return lambda: cuda.cudaMemsetAsync(block, 0, ctypes.c_size_t(64), on)
s = stream()
"""


def test_work_that_is_captured_is_no_violation(program: Program) -> None:
    _, log = program(CUDA + "work = memset(s); begin(s); assert work() == 0; assert end(s) == (0, True)")
    assert not log.violations
    assert log.captures == [(0, 0)]  # a memset is no kernel


@pytest.mark.parametrize(
    "unsafe",
    ["malloc()", "cuda.cudaDeviceSynchronize()", "cuda.cudaEventQuery(e)", "cuda.cudaEventSynchronize(e)"],
)
@pytest.mark.parametrize(
    ("mode", "own_thread", "forbidden"),
    [
        ("GLOBAL", True, True),
        ("GLOBAL", False, True),
        ("THREAD_LOCAL", True, True),
        ("THREAD_LOCAL", False, False),
        ("RELAXED", True, False),
        ("RELAXED", False, False),
    ],
)
def test_unsafe_calls(program: Program, unsafe: str, mode: str, own_thread: bool, forbidden: bool) -> None:
    """Refused by the mode of the capture, and the capture is lost."""
    call = f"(lambda: {unsafe})()" if own_thread else f"in_thread(lambda: {unsafe})"
    found, log = program(
        CUDA + f"e = event(); assert cuda.cudaEventRecord(e, stream()) == 0; begin(s, {mode}); print({call}, *end(s))"
    )
    assert found.split() == (["900", "901", "False"] if forbidden else ["0", "0", "True"])
    assert bool(log.violations) == forbidden


def test_a_thread_may_relax_its_own_mode(program: Program) -> None:
    """torch's allocator switches the mode for cudaMalloc; the mode before is restored."""
    found, log = program(
        CUDA
        + """
        begin(s)
        mode = ctypes.c_int(RELAXED)
        assert cuda.cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode)) == 0
        print(mode.value, malloc(), *end(s))
        """.replace("\n        ", "\n")
    )
    assert found.split() == ["0", "0", "0", "True"]
    assert not log.violations


def test_a_captured_stream_cannot_be_waited_for(program: Program) -> None:
    found, log = program(CUDA + "begin(s, RELAXED); print(cuda.cudaStreamSynchronize(s), *end(s))")
    assert found.split() == ["900", "901", "False"]
    assert list(log.violations) == ["cudaStreamSynchronize of a stream that is captured"]


def test_a_copy_of_pageable_memory_cannot_be_captured(program: Program) -> None:
    source = """
host, pinned = ctypes.create_string_buffer(64), ctypes.c_void_p()
device = made(cuda.cudaMalloc, ctypes.c_size_t(64))
assert cuda.cudaHostAlloc(ctypes.byref(pinned), ctypes.c_size_t(64), 0) == 0
begin(s)
for memory in (pinned, host): print(cuda.cudaMemcpyAsync(device, memory, ctypes.c_size_t(64), 1, s))
"""
    found, log = program(CUDA + source)
    assert found.split() == ["0", "900"]
    assert list(log.violations) == ["a copy of pageable memory while a stream is captured"]


def test_a_stream_that_joins_must_be_joined(program: Program) -> None:
    source = """
other, forked, joined, work = stream(), event(), event(), memset
other_work = memset(other)
for joins, more in ((False, False), (True, False), (True, True)):
    begin(s)
    assert cuda.cudaEventRecord(forked, s) == 0 and cuda.cudaStreamWaitEvent(other, forked, 0) == 0
    assert other_work() == 0
    if joins:
        assert cuda.cudaEventRecord(joined, other) == 0 and cuda.cudaStreamWaitEvent(s, joined, 0) == 0
    if more: other_work()
    print(*end(s))
"""
    found, log = program(CUDA + source)
    assert found.split() == ["904", "False", "0", "True", "904", "False"]
    assert list(log.violations) == ["a stream that joined a capture was not joined"]


def test_work_beside_the_capture_is_a_violation(program: Program) -> None:
    """The call would run once, and in no replay."""
    _, log = program(CUDA + "other = memset(stream()); begin(s); other(); end(s)")
    assert list(log.violations) == ["memset outside of the capture that this thread makes"]


def test_an_event_outside_cannot_be_waited_for(program: Program) -> None:
    source = """
e = event()
cuda.cudaEventRecord(e, stream())
begin(s)
print(cuda.cudaStreamWaitEvent(s, e, 0), *end(s))
"""
    found, _ = program(CUDA + source)
    assert found.split() == ["905", "901", "False"]


def test_an_event_of_a_capture_cannot_be_asked(program: Program) -> None:
    found, _ = program(CUDA + "e = event(); begin(s); cuda.cudaEventRecord(e, s); print(cuda.cudaEventQuery(e))")
    assert found.split() == ["907"]


def test_another_thread_cannot_end_a_capture(program: Program) -> None:
    found, _ = program(CUDA + "begin(s); print(*in_thread(lambda: end(s)))")
    assert found.split() == ["908", "False"]


@pytest.mark.parametrize("unsafe", ["malloc()", "cuda.cudaStreamSynchronize(s)", "cuda.cudaDeviceSynchronize()"])
def test_a_replayed_step_asks_for_nothing(program: Program, unsafe: str) -> None:
    _, log = program(CUDA + f"{unsafe}; cuda.fakegpu_step(1); {unsafe}; cuda.fakegpu_step(0); {unsafe}")
    assert sum(log.violations.values()) == 1
    assert next(iter(log.violations)).endswith("in a replayed step")
