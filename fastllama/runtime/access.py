"""Access control of an engine: the process that made it, and within it threads in turns or one exclusive owner."""

from __future__ import annotations

import os
import threading
from _thread import RLock
from collections.abc import Callable
from typing import NamedTuple


class _Owner(NamedTuple):
    thread: threading.Thread
    end: Callable[[], None]  # ends the thread, which then gives the engine back


class Access(RLock):  # type: ignore[misc]  # final to mypy, not to Python
    """A fair lock, `with access:`, for using an engine: a waiting thread gets it before another gets it twice.

    So threads share an engine step by step, and each step advances the requests of all. Raises RuntimeError without
    waiting: in a forked process, whose copies of pages and kernel threads are unusable; while another thread owns the
    engine; and within a `with` of the same thread (a hook, tokenizer or logits processor must not change a running
    step).

    A subclass of RLock, so that `with` ends in the lock's own method, which Ctrl-C cannot interrupt.
    """

    def __init__(self) -> None:
        super().__init__()
        self._pid = os.getpid()
        self._entrance = threading.Lock()  # held by the one waiting thread, so that none overtakes it
        self._owner: _Owner | None = None

    def __enter__(self) -> bool:  # type: ignore[override]
        self.check_process()
        self._check_outside()
        try:
            self._check_owner()  # holds it for long, so is not waited for
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
        """Whether this thread is inside a `with`."""
        return bool(self._is_owned())  # type: ignore[attr-defined]

    @property
    def forked(self) -> bool:
        """Whether this is not the process that made the lock."""
        return os.getpid() != self._pid

    def check_process(self) -> None:
        """Raises RuntimeError in a forked process."""
        if self.forked:
            raise RuntimeError(
                f"this LLM was made in process {self._pid}, from which this one was forked; legal: an LLM made in each "
                "process, of processes that are started anew (multiprocessing's 'spawn', gunicorn without --preload)"
            )

    def claim(self, thread: threading.Thread, end: Callable[[], None]) -> None:
        """Make a thread the exclusive owner, until it calls give_up. end: called by `evict`, from any thread.

        Raises RuntimeError if another thread is the owner.
        """
        with self:
            self._owner = _Owner(thread, end)

    def give_up(self) -> None:
        """Admit all threads again; called by the owner's thread."""
        self._owner = None

    def evict(self) -> None:
        """Make the owner end, if there is one, and wait for it. Raises RuntimeError inside a `with`."""
        self._check_outside()
        owner = self._owner
        if owner is not None and not self.forked:
            owner.end()
            owner.thread.join()

    def _check_outside(self) -> None:
        if self.inside:
            raise RuntimeError("this LLM was called from within one of its steps; legal: calls between steps")

    @property
    def claimed_by_another(self) -> bool:
        """Whether another thread is the exclusive owner."""
        owner = self._owner
        return owner is not None and owner.thread is not threading.current_thread()

    def _check_owner(self) -> None:
        if self.claimed_by_another:
            raise RuntimeError(
                "this LLM serves an AsyncEngine; legal: that engine's methods, or this LLM's after its shutdown()"
            )
