"""Keeps requests, scheduler and pages consistent where an interrupt (Ctrl-C) or a bug breaks into a change of them."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType


class Consistency:
    """Says after each change of the bookkeeping whether it is whole or torn.

        with consistency.change():  # torn from here on ...
            with consistency.attempt():
                ...  # whatever this raises, `roll_back` makes the bookkeeping whole
            ...
        # ... and whole again

    What leaves a change by an exception, but not through an attempt, leaves it torn: which pages belong to whom is
    then unknown, and the next change starts anew first. Wherever an interrupt comes, here too, the bookkeeping is
    whole or known to be torn: it is declared whole last.
    start_anew: ends every request and empties the pool; is called again where it was interrupted itself.
    roll_back: undoes what is in flight.
    """

    def __init__(self, start_anew: Callable[[], None], roll_back: Callable[[], None]) -> None:
        self.torn = False
        self._start_anew = start_anew
        self._change, self._attempt = _Change(self), _Attempt(self, roll_back)

    def mend(self) -> None:
        """Start anew if the last change was broken into."""
        if self.torn:
            self._start_anew()
            self.torn = False

    def change(self) -> _Change:
        """Around a change of several parts, on whole ones."""
        return self._change

    def attempt(self) -> _Attempt:
        """Around a part of a change that may raise without harm to the bookkeeping: running the model, copying."""
        return self._attempt


class _Change:
    def __init__(self, consistency: Consistency) -> None:
        self._consistency = consistency

    def __enter__(self) -> None:
        self._consistency.mend()
        self._consistency.torn = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._consistency.torn = False


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
