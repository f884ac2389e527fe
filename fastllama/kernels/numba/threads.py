"""Threads for kernels, on a machine that runs other programs as well.

A kernel's iterations are handed out in pieces (pieces.py): a thread that loses its core delays one piece, not half of
the work. The caller does not wait for helpers to begin, and no thread spins for long: at the end of its work the caller
soon sleeps, and so frees its core for the thread that it waits for. And helpers must pay: every so often a few
milliseconds are run the other way, alone or with helpers, and the faster way is kept. OpenMP, by which Numba and torch
run threads, spins for milliseconds at the end of each of a hundred kernels a token: where two programs compete for the
two cores of a machine, 120 tokens of a small model took 10 s by it, 0.1 alone (docs/measured/cpu.md).

A forked process starts its own helpers once it sets more torch threads than the one that it begins with
(dispatch/isolation.py).
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import torch
from numba.core.compiler_lock import global_compiler_lock

from fastllama.kernels.numba.pieces import FAILED, FINISHED, HELPERS, PIECES, WORDS, give_up, serve, wait_turns

SERIAL_WORK = 100_000  # multiplications, some microseconds: up to here a helper does not pay
LEAST_PIECE, LARGEST_PIECE = 1 << 15, 1 << 22  # multiplications
PIECES_OF_A_THREAD = 4
END_PATIENCE, IDLE_PATIENCE = 30e-6, 300e-6  # seconds for which the caller spins for the last pieces, a helper for work
NAP = 50e-6  # seconds between looks at a piece that takes longer

Kernel = Callable[..., int]


class Payoff:
    """Measures whether helpers pay: the faster way of running, alone or together, is kept.

    Now and then the other way is tried for a stretch, the longer it has lost the more rarely, and its calls are
    compared with the usual time of similar calls (of one kernel and as much work).
    """

    STRETCH = 0.02  # seconds: some slices of a scheduler
    SHORT = 0.004  # seconds of a trial that is clearly lost
    PAUSES = 0.1, 2.0  # seconds between trials, at first and at most
    WORSE = 1.5  # times the usual: then a trial is lost, and if helpers were kept, a trial without them begins
    GAIN = 0.95  # of the time alone, at most, for helpers to be taken
    GAP = 200e-6  # seconds before a call that count as its own, at most: its threads slow down other work
    WEIGHT = 0.05  # of the last call in the usual time
    KNOWN = 4096  # kinds of calls: a server that runs for months gets prompts of any length

    def __init__(self) -> None:
        self.together = True  # how the next call is to run
        self._better = True  # the way that takes less time
        self._usual: dict[Hashable, float] = {}  # seconds of calls by it
        self._seconds = self._expected = 0.0  # of this stretch, of calls that are known
        self._unknown = 0.0  # seconds of its other calls
        self._since = self._pause = 0.0  # seconds since the last trial, and to the next
        self._end = 0.0

    def note(self, call: Hashable, start: float, end: float) -> None:
        """Record a call that ran from start to end, in seconds, the way that `together` specified."""
        before = start - self._end
        seconds = end - start + (before if before < self.GAP else self.GAP)
        self._end = end
        usual = self._usual.get(call)
        if usual is not None:
            self._seconds += seconds
            self._expected += usual
        else:
            self._unknown += seconds
        if self.together == self._better:
            self._usual[call] = seconds if usual is None else usual + self.WEIGHT * (seconds - usual)
        if self._seconds >= self.STRETCH or self._unknown >= 5 * self.STRETCH or self._is_lost():
            self._decide()

    def _is_lost(self) -> bool:
        """Whether this is a trial that is lost already."""
        return self.together != self._better and self._seconds > max(self.SHORT, self.WORSE * self._expected)

    def _decide(self) -> None:
        seconds, expected, passed = self._seconds, self._expected, self._seconds + self._unknown
        self._seconds = self._expected = self._unknown = 0.0
        if len(self._usual) > self.KNOWN:
            self._usual.clear()
        if self.together != self._better:  # a trial ends
            if seconds < expected * (self.GAIN if self.together else 1):
                self._better, self._pause = self.together, self.PAUSES[0]
                self._usual.clear()
            else:
                self._pause = min(max(4 * self._pause, self.PAUSES[0]), self.PAUSES[1])
            self.together, self._since = self._better, 0.0
            return
        self._since += passed
        worse = self.together and seconds > self.WORSE * expected > 0
        if worse or self._since >= self._pause:
            self.together = not self._better
            if worse:
                self._pause = self.PAUSES[0]


class Team:
    """Helper threads, which sleep until a region wakes them, and again after a while without work."""

    def __init__(self) -> None:
        memory = np.zeros(WORDS + 16, np.int64)
        start = -memory.ctypes.data % 128 // 8
        self._state = memory[start : start + WORDS]
        self._address = self._state.ctypes.data
        self._lock = threading.Lock()  # of the state: one region at a time
        self._wakes: list[threading.Lock] = []
        self._asleep: list[bool] = []
        self._helpers = 0
        self.payoff = Payoff()
        turn = _seconds_of_a_turn()
        self._end_turns, self._idle_turns = int(END_PATIENCE / turn), int(IDLE_PATIENCE / turn)

    def launch(self, kernel: Kernel, helpers: int, grain: int, count: int, args: tuple[Any, ...]) -> bool:
        """Run a kernel's iterations with helpers. Returns False, and runs nothing, while another kernel has them."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            self._wake(helpers)
            kernel((self._address, grain, count, self._end_turns), *args)
        except BaseException:
            give_up(self._address)
            raise
        finally:
            try:
                self._wait()
            finally:
                self._lock.release()
        if self._state[FAILED]:
            raise MemoryError(f"a helper found no memory in {kernel.__name__}")
        return True

    def retire(self) -> None:
        """Put the helpers to sleep for good: none may need the interpreter while it exits."""
        self._state[HELPERS] = 0
        end = time.monotonic() + 1
        while not all(self._asleep) and time.monotonic() < end:
            time.sleep(NAP)

    def _wake(self, helpers: int) -> None:
        if helpers != self._helpers:
            for number in range(len(self._wakes), helpers):
                self._wakes.append(threading.Lock())
                self._wakes[number].acquire()
                self._asleep.append(False)
                threading.Thread(target=self._help, args=(number,), name=f"fastllama-{number}", daemon=True).start()
            self._helpers = self._state[HELPERS] = helpers
        for number in range(helpers):
            if self._asleep[number]:
                self._asleep[number] = False
                self._wakes[number].release()

    def _help(self, number: int) -> None:
        while True:
            serve(self._address, number, self._idle_turns)
            self._asleep[number] = True
            self._wakes[number].acquire()

    def _wait(self) -> None:
        """Sleep until all pieces are finished; an interrupt is raised only then, lest helpers write to freed memory."""
        interrupt = None
        while True:
            try:
                while self._state[FINISHED] < self._state[PIECES]:
                    time.sleep(NAP)
                break
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt


def launch(kernel: Kernel, count: int, work: int, *args: Any) -> None:
    """Run kernel(region, *args) over `count` iterations, on as many of torch's threads as pay.

    work: multiplications, or operations that take as long, of all iterations. Results depend neither on threads nor on
    pieces.
    """
    helpers = torch.get_num_threads() - 1 if work > SERIAL_WORK else 0
    if not helpers:
        kernel((0, 0, count, 0), *args)
        return
    team, start = _team(), time.perf_counter()
    share = min(max(work // (PIECES_OF_A_THREAD * (helpers + 1)), LEAST_PIECE), LARGEST_PIECE)
    grain = max(1, count * share // work)
    if not (team.payoff.together and team.launch(kernel, helpers, grain, count, args)):
        kernel((0, 0, count, 0), *args)
    team.payoff.note((kernel, work), start, time.perf_counter())


def _seconds_of_a_turn() -> float:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        wait_turns(1000)
        seconds.append((time.perf_counter() - start) / 1000)
    return min(seconds)


_teams: list[Team] = []  # none or one


def _team() -> Team:
    if not _teams:
        _teams.append(Team())  # of two threads that are here at once, one makes a team that stays unused
    return _teams[0]


def _retire() -> None:
    for team in _teams:
        team.retire()


atexit.register(_retire)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_teams.clear)  # a child does not inherit threads
    # Forked while another thread compiles, a child would find the compiler's lock taken, and wait forever.
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )
