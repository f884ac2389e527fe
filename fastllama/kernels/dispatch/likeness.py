"""Recognises a call whose arguments are like an earlier call's, so that it is checked and prepared once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from operator import itemgetter
from typing import Any

from torch import Tensor
from torch._C._dynamo.guards import TensorGuards

_PLAIN = (bool, int, float, type(None))
Arguments = tuple[Any, ...]


class Likeness:
    """What the legality of a call hangs on: its tensors' metadata, which of them are one tensor, all other arguments.

    Metadata are type, device, dtype, shape, strides and requires_grad: not the address, not what a tensor holds. The
    guard that torch.compile evaluates before it runs compiled code compares them: 0.9 us for seven tensors, of which
    Python would need 0.3 us each to read them. It also compares the dispatch keys of tensors and of the thread, so that
    no wrapped tensor and no call under a transform of torch is like a call that was none.

    match: returns the tensors of a call of the same op, each once, where it is like the first; else None. places: of
    these tensors. plain: whether all other arguments are numbers, so that other calls can be like this one.
    """

    def __init__(self, args: Arguments, tensors: Collection[int]) -> None:
        """Of a call with these arguments, where `tensors` are the places that a tensor or None must take."""
        first: dict[int, int] = {}  # where each tensor occurs first, by identity
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
        sizes: list[Any] = [list(tensor.shape) for tensor in unique]  # each as it is: none may vary
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
    """A function that returns the arguments at some places, at least one, as a tuple."""
    if len(places) > 1:
        return itemgetter(*places)
    (place,) = places
    return lambda args: (args[place],)


def _nothing(args: Arguments) -> None:
    """What a call has besides its tensors."""
