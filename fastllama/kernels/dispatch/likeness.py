"""Recognises a call whose arguments are like an earlier call's, so that it is checked and prepared once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from operator import itemgetter
from typing import Any

from torch._C._dynamo.guards import TensorGuards

_PLAIN = (bool, int, float, type(None))
Arguments = tuple[Any, ...]


class Likeness:
    """What the legality of a call hangs on: its tensors' metadata, which of them are one tensor, all other arguments.

    Metadata are type, device, dtype, shape, strides and requires_grad: not the address, not what a tensor holds. The
    guard that torch.compile evaluates before it runs compiled code compares them: 0.9 us for seven tensors, of which
    Python would need 0.3 us each to read them.
    """

    def __init__(self, args: Arguments, tensors: Collection[int]) -> None:
        """Of a call with these arguments, where `tensors` are the places that a tensor or None must take."""
        first: dict[int, int] = {}  # where each tensor occurs first, by identity
        self._same, others = [], []
        for place, arg in enumerate(args):
            if place not in tensors or arg is None:
                others.append(place)
            elif id(arg) in first:
                self._same.append((place, first[id(arg)]))
            else:
                first[id(arg)] = place
        unique = [args[place] for place in first.values()]
        sizes: list[Any] = [list(tensor.shape) for tensor in unique]  # each as it is: none may vary
        strides: list[Any] = [list(tensor.stride()) for tensor in unique]
        self._guards = TensorGuards(*unique, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        self._tensors, self._others = _picker([*first.values()]), _picker(others)
        self._values = self._others(args)
        self.plain = all(isinstance(value, _PLAIN) for value in self._values)
        self.requires_grad = any(tensor.requires_grad for tensor in unique)

    def __call__(self, args: Arguments) -> bool:
        """Whether a call of the same op with these arguments is like the first."""
        for place, other in self._same:
            if args[place] is not args[other]:
                return False
        return self._guards.check(*self._tensors(args)) and self._others(args) == self._values


def _picker(places: Sequence[int]) -> Callable[[Arguments], Arguments]:
    """The arguments at some places, as a tuple."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda args: tuple(args[place] for place in places)
