"""Recognises calls whose arguments are like an earlier call's, so that only the first is checked and prepared."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from operator import itemgetter
from typing import Any

from torch import Tensor
from torch._C._dynamo.guards import TensorGuards

_PLAIN = (bool, int, float, type(None))
Arguments = tuple[Any, ...]


class Likeness:
    """What decides whether a call is legal: its tensors' metadata, which of them are identical, all other arguments.

    Metadata are type, device, dtype, shape, strides and requires_grad, but neither address nor values. They are
    compared by torch.compile's guards: 0.9 us for seven tensors, where reading them in Python takes 0.3 us each. The
    guards also compare the dispatch keys of tensors and of the thread, so that a wrapped tensor, or a call under a
    transform of torch, never matches a plain call.

    match: returns the distinct tensors of a call of the same op if it is like the first; else None. places: positions
    of these tensors. plain: whether all other arguments are numbers, without which no call can match.
    """

    def __init__(self, args: Arguments, tensors: Collection[int]) -> None:
        """args: of the call. tensors: the positions that hold a tensor or None."""
        first: dict[int, int] = {}  # the first position of each tensor, by identity
        same, others = [], []
        for place, arg in enumerate(args):
            if place not in tensors or arg is None:
                others.append(place)
            elif id(arg) in first:
                same.append((place, first[id(arg)]))
            else:
                first[id(arg)] = place
        self.places = [*first.values()]  # of the tensors
        unique = [args[place] for place in self.places]
        sizes: list[Any] = [list(tensor.shape) for tensor in unique]  # exact: no dimension is dynamic
        strides: list[Any] = [list(tensor.stride()) for tensor in unique]
        self.requires_grad = any(tensor.requires_grad for tensor in unique)
        self.plain = all(isinstance(args[place], _PLAIN) for place in others)
        guards = TensorGuards(*unique, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        pick = itemgetter(*others) if others else _nothing
        values = frozenset([pick(args)]) if self.plain else frozenset()  # compared by hash: a tensor equals no number
        self.match = _matcher(guards.check, picker(self.places), same, pick, values)


def _matcher(
    check: Callable[..., bool],
    tensors: Callable[[Arguments], tuple[Tensor, ...]],
    same: Sequence[tuple[int, int]],
    pick: Callable[[Arguments], Any],
    values: Collection[Any],
) -> Callable[[Arguments], tuple[Tensor, ...] | None]:
    """`Likeness.match`. A closure: attributes of an object would take 0.1 us to read."""

    def match(args: Arguments) -> tuple[Tensor, ...] | None:
        if same:
            for place, other in same:
                if args[place] is not args[other]:
                    return None
        found = tensors(args)
        return found if check(*found) and pick(args) in values else None

    return match


def picker(places: Sequence[int]) -> Callable[[Arguments], Arguments]:
    """A function that returns the arguments at some positions, at least one, as a tuple."""
    if len(places) > 1:
        return itemgetter(*places)
    (place,) = places
    return lambda args: (args[place],)


def _nothing(args: Arguments) -> None:
    """The other arguments of a call that has tensors alone."""
