"""Who may use an engine: the process that made it, and in there any threads in turns, or one owner alone."""

from __future__ import annotations

import os
import threading
from _thread import RLock
from collections.abc import Callable
from typing import NamedTuple


class _Owner(NamedTuple):
    thread: threading.Thread
    end: Callable[[], None]  # has the thread end, and so give the engine back


class Access(RLock):  # type: ignore[misc]  # final to mypy, not to Python
    """`with access:` around what uses an engine. A thread waits for its turn, and none has two before it gets one.

    So threads share an engine step by step, and each step advances the requests of all. Raises RuntimeError, and waits
    for nothing: in a forked process, whose copies of pages and kernel threads are of no use; beside an owner; and
    within a `with` of the same thread (a hook, a tokenizer, a logits processor in a step would change what runs).

    A subclass, so that the end of a `with` is the lock's own method, into which Ctrl-C cannot break.
    """

    def __init__(self) -> None:
        super().__init__()
        self._pid = os.getpid()
        self._entrance = threading.Lock()  # of the one who waits: nobody overtakes
        self._owner: _Owner | None = None

    def __enter__(self) -> bool:  # type: ignore[override]
        self.check_process()
        self._check_outside()
        try:
            self._check_owner()  # who has it for long, and so is not waited for
            with self._entrance:
                self.acquire()
            self._check_owner()
            return True
        except BaseException:
            if self.inside:
                self.release()
            raise

    @property
    def inside(self) -> bool:
        """Whether this thread is within a `with`."""
        return bool(self._is_owned())  # type: ignore[attr-defined]

    @property
    def forked(self) -> bool:
        """Whether this process is not the one that made it."""
        return os.getpid() != self._pid

    def check_process(self) -> None:
        """Raises RuntimeError in a forked process."""
        if self.forked:
            raise RuntimeError(
                f"this LLM was made in process {self._pid}, from which this one was forked; legal: an LLM made in each "
                "process, of processes that are started anew (multiprocessing's 'spawn', gunicorn without --preload)"
            )

    def claim(self, thread: threading.Thread, end: Callable[[], None]) -> None:
        """Let this thread in alone, until it gives up. end: called by `evict`, from any thread.

        Raises RuntimeError where another thread has claimed it.
        """
        with self:
            self._owner = _Owner(thread, end)

    def give_up(self) -> None:
        """Let everybody in again; said by the owner's thread."""
        self._owner = None

    def evict(self) -> None:
        """Have the owner end, if there is one, and wait until it has. Raises RuntimeError within a `with`."""
        self._check_outside()
        owner = self._owner
        if owner is not None and not self.forked:
            owner.end()
            owner.thread.join()

    def _check_outside(self) -> None:
        if self.inside:
            raise RuntimeError("this LLM runs a step, from which it is called; legal: calls between steps")

    @property
    def claimed_by_another(self) -> bool:
        """Whether it belongs to another thread alone."""
        owner = self._owner
        return owner is not None and owner.thread is not threading.current_thread()

    def _check_owner(self) -> None:
        if self.claimed_by_another:
            raise RuntimeError(
                "this LLM serves an AsyncEngine; legal: that engine's methods, or this LLM's after its shutdown()"
            )
