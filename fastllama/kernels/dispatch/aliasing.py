"""Finds tensors of a call that share memory, where an op would read elements that it has already overwritten."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import Tensor

MOST_WORK = 100_000  # candidates that NumPy checks for an overlap of two strided tensors: 1 ms

InPlace = Mapping[str, Mapping[str, int]]


class Aliasing:
    """The rules for which tensors of an op's calls may share memory.

    names: of all arguments. written: positions of the tensors that the op writes. in_place: for each output, the inputs
    that it may overwrite elementwise, each with the number of output rows that fit into an input row (`silu_mul` may
    overwrite either half of its input: 2; else 1, the input itself or the beginning of its rows).
    kept_apart: pairs of names that may be views of one buffer, offset by whole rows: pages of keys and of values, which
    the slots keep apart.
    """

    def __init__(
        self,
        names: Sequence[str],
        written: Collection[int],
        in_place: InPlace,
        kept_apart: Collection[tuple[str, str]] = (),
    ) -> None:
        self._names, self._written, self._in_place = names, written, in_place
        self._kept_apart = [{names.index(one), names.index(other)} for one, other in kept_apart]

    def overlaps(self, args: Sequence[Any]) -> Iterator[tuple[int, int]]:
        """Positions of each written tensor and of another that illegally shares memory with it.

        Raises ValueError for a written tensor with two elements at one address, as an expanded tensor has.
        """
        spans = _spans(args)
        for place in self._written:
            if place in spans and _folds(args[place]):
                shape, strides = list(args[place].shape), list(args[place].stride())
                raise ValueError(
                    f"{self._names[place]} has shape {shape} and strides {strides}, so that elements share memory; "
                    "legal: memory of its own for each, as it is written"
                )
        for place, other in self._pairs(spans):
            (start, end), (other_start, other_end) = spans[place], spans[other]
            if other_end <= start or end <= other_start or self._is_in_place(place, other, args):
                continue
            if {place, other} in self._kept_apart and _is_rows_apart(args[place], args[other]):
                continue
            if _share(args[place], args[other]):
                yield place, other

    def near(self, places: Sequence[int], args: Sequence[Any]) -> list[tuple[int, int, int, int]]:
        """(i, j, low, high) for each pair of tensors with one that is written: the distances at which they may overlap.

        places: the position of each distinct tensor; i and j index into it. The two do not overlap if the address of
        tensor i minus that of tensor j is at most `low` or at least `high`.
        """
        sizes = {place: end - start for place, (start, end) in _spans(args).items()}
        indices = {id(args[place]): index for index, place in enumerate(places)}
        found = [
            (indices[id(args[place])], indices[id(args[other])], -sizes[place], sizes[other])
            for place, other in self._pairs(sizes)
        ]
        # One tensor passed twice is checked once, with its Likeness.
        return [each for each in found if each[0] != each[1]]

    def _pairs(self, places: Collection[int]) -> Iterator[tuple[int, int]]:
        """Each pair of positions once, the first of a written tensor."""
        for place in self._written:
            for other in places if place in places else ():
                if other != place and not (other in self._written and other < place):
                    yield place, other

    def refusal(self, place: int, other: int) -> str:
        """The error message for an illegal overlap."""
        name, over = self._names[place], self._names[other]
        exact = f", or {over} itself" if over in self._in_place.get(name, ()) else ""
        return f"{name} shares memory with {over}; legal: memory of its own{exact}"

    def _is_in_place(self, place: int, other: int, args: Sequence[Any]) -> bool:
        """Whether each element of an output has the address of the input element from which it is computed."""
        parts = self._in_place.get(self._names[place], {}).get(self._names[other], 0)
        out, x = args[place], args[other]
        lead = x.dim() - 1
        if out.dtype != x.dtype or out.shape[:lead] != x.shape[:lead]:
            return False
        for dim, size in enumerate(x.shape[:lead]):
            if size > 1 and out.stride(dim) != x.stride(dim):
                return False
        row, source = out[(0,) * lead], x[(0,) * lead]
        if row.stride() != source.stride() and not (row.is_contiguous() and source.is_contiguous()):
            return False
        part, rest = divmod(out.data_ptr() - x.data_ptr(), row.nbytes)
        return not rest and 0 <= part < parts and (part + 1) * row.numel() <= source.numel()


def _is_rows_apart(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of the same strides begin at different rows of one buffer."""
    row, distance = a.stride(0) * a.itemsize, a.data_ptr() - b.data_ptr()
    return a.stride() == b.stride() and distance != 0 and row != 0 and distance % row == 0


def _spans(args: Sequence[Any]) -> dict[int, tuple[int, int]]:
    """The address range of each tensor that is not empty, by position."""
    return {place: _span(arg) for place, arg in enumerate(args) if isinstance(arg, Tensor) and arg.numel()}


def _span(tensor: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte and of the one past its last."""
    start = tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.itemsize


def _folds(tensor: Tensor) -> bool:
    """Whether two elements of a tensor may have one address: some stride is less than the extent within it."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach += (size - 1) * stride
    return False


def _share(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors share a byte. Columns of one buffer do not, although their ranges interleave."""
    try:
        return np.shares_memory(_addressed(a), _addressed(b), max_work=MOST_WORK)  # type: ignore[arg-type]  # any int
    except np.exceptions.TooHardError:
        return True


def _addressed(tensor: Tensor) -> Any:
    """A NumPy array with the addresses of a tensor on any device; its elements are never read."""
    size = tensor.itemsize
    interface = {
        "version": 3,
        "data": (tensor.data_ptr(), False),
        "shape": tuple(tensor.shape),
        "strides": tuple(stride * size for stride in tensor.stride()),
        "typestr": f"|V{size}",
    }
    return np.asarray(SimpleNamespace(__array_interface__=interface))
