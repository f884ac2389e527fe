"""Keeps requests, scheduler and pages consistent where an interrupt (Ctrl-C) or a bug breaks into a change of them."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType


class Consistency:
    """Says after each change of the bookkeeping whether it is whole or torn.

        with consistency.change(start_anew):  # torn from here on ...
            with consistency.attempt(roll_back):
                ...  # whatever this raises, `roll_back` makes the bookkeeping whole
            ...
        # ... and whole again

    What leaves a change by an exception, but not through an attempt, leaves it torn: which pages belong to whom is
    then unknown, and the next change starts anew first. Wherever an interrupt comes, here too, the bookkeeping is
    whole or known to be torn: it is declared whole last.
    start_anew: ends every request and empties the pool; is called again where it was interrupted itself.
    roll_back: undoes what is in flight. Neither is kept: a method of who owns this would hold its owner, and with it
    the model, until the garbage collector comes by.
    """

    def __init__(self) -> None:
        self.torn = False
        self.cause = ""  # what broke into a change last

    def mend(self, start_anew: Callable[[], None]) -> None:
        """Start anew if the last change was broken into."""
        if self.torn:
            start_anew()
            self.torn = False

    def change(self, start_anew: Callable[[], None]) -> _Change:
        """Around a change of several parts, on whole ones."""
        return _Change(self, start_anew)

    def attempt(self, roll_back: Callable[[], None]) -> _Attempt:
        """Around a part of a change that may raise without harm to the bookkeeping: running the model, copying."""
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
