"""Restores consistent bookkeeping after an interrupt (Ctrl-C) or a bug in the middle of a change."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType


class Consistency:
    """Records whether the bookkeeping of requests, scheduler and pages is consistent or torn.

        with consistency.change(start_anew):  # torn from here on ...
            with consistency.attempt(roll_back):
                ...  # whatever this raises, `roll_back` makes the bookkeeping consistent
            ...
        # ... and consistent again

    An exception that leaves a change, but not through an attempt, leaves the bookkeeping torn: page ownership is then
    unknown, and the next change first calls start_anew. An interrupt at any point, in this class too, leaves it
    consistent or marked as torn, because the mark is cleared last.
    start_anew: ends every request and empties the pool; is called again if it was interrupted itself.
    roll_back: undoes the steps in flight. Neither callback is stored: a bound method would keep its owner, and so the
    model, alive until the garbage collector runs.
    """

    def __init__(self) -> None:
        self.torn = False
        self.cause = ""  # the exception that interrupted the last change

    def mend(self, start_anew: Callable[[], None]) -> None:
        """Call start_anew if the last change was interrupted."""
        if self.torn:
            start_anew()
            self.torn = False

    def change(self, start_anew: Callable[[], None]) -> _Change:
        """Returns a context manager for a change in several parts; starts from consistent bookkeeping."""
        return _Change(self, start_anew)

    def attempt(self, roll_back: Callable[[], None]) -> _Attempt:
        """Returns a context manager for a part that may raise and can be rolled back (running the model, copying)."""
        return _Attempt(self, roll_back)


class _Change:
    def __init__(self, consistency: Consistency, start_anew: Callable[[], None]) -> None:
        self._consistency, self._start_anew = consistency, start_anew

    def __enter__(self) -> None:
        self._consistency.mend(self._start_anew)
        self._consistency.torn = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._consistency.torn = False
        else:
            self._consistency.cause = repr(error)


class _Attempt:
    def __init__(self, consistency: Consistency, roll_back: Callable[[], None]) -> None:
        self._consistency, self._roll_back = consistency, roll_back

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._roll_back()
            self._consistency.torn = False
