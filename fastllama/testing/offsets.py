"""Finds pointer offsets in a kernel's Triton IR that are computed in 32 bits and may overflow.

An integer argument below 2^31 is an i32, and so is a constexpr stride: `head * HEAD_STRIDE` overflows where heads are
2^30 elements apart, though each number is legal. Tests with small tensors cannot find that, tests with large ones only
for their strides. This reads the intermediate representation instead, with all helpers inlined: about 20 ms per
kernel, without a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastllama.testing.triton_ir import Reader, Value

LIMITS = (2**31 - 1, 65535, 65535)  # of a grid's axes: CUDA C++ Programming Guide, "Technical Specifications"

Bounds = tuple[int, int]


@dataclass(frozen=True)
class Narrow:
    """An operation of at most 32 bits that an offset depends on, and that may overflow."""

    kernel: str
    line: str  # "prefill.py:93"
    code: str  # that line of the source
    operation: str  # `product`, `shift` or `sum`
    operands: tuple[str, ...]  # names and ranges: "head (0 to 31)"
    range: Bounds  # of the exact result

    def __str__(self) -> str:
        low, high = self.range
        what = f"a {self.operation} of {' and '.join(self.operands)} is {low} to {high}, in 32 bits"
        return f"{self.kernel}, {self.line}: {what}: {self.code}"


def narrow_offsets(text: str, grid: Sequence[int] = LIMITS) -> list[Narrow]:
    """The multiplications, shifts and sums of a kernel's Triton IR that may overflow 32 bits and reach an offset.

    grid: maximum number of programs per axis. Ranges cover all launches of the compiled kernel: an integer argument is
    a size or a stride, so from 0 to 2^31 - 1; a loaded value has its type's range, a program index its axis's, a
    constant its value. So compile with constexpr strides near 2^30, and sizes of 2^17, to cover those that callers may
    choose.

    A multiplication is reported if its range exceeds its type, be it for an unbounded operand or a large constant. A
    sum is reported if both ranges are bounded and one depends on a multiplication: an unbounded number plus a small one
    is a row or a column, of which a tensor has fewer than 2^31. A multiplication is bounded, and not reported, where a
    remainder, a minimum, a loop's end or the grid bounds its operands: a tile's column (`program_id(1) * BLOCK`).
    """
    read = Reader(text)
    ranges = _Ranges(read.values, grid)
    kernel, found, seen = read.kernel, [], set()
    todo = list(read.offsets)
    while todo:
        value = todo.pop()
        if value.number in seen or not value.width:
            continue
        seen.add(value.number)
        todo += value.sources
        exact = ranges.exact(value)
        if exact is not None:
            line, code = read.place(value.location)
            operands = tuple(ranges.describe(each) for each in value.operands)
            found.append(Narrow(kernel, line, code, _REPORTED[value.kind], operands, exact))
    return sorted(set(found), key=lambda each: (each.line, each.range))


_REPORTED = {"arith.muli": "product", "arith.shli": "shift", "arith.addi": "sum", "arith.subi": "sum"}


class _Ranges:
    """The range of each value, computed without overflow."""

    def __init__(self, values: list[Value], grid: Sequence[int]) -> None:
        self._grid = (*grid, *LIMITS[len(grid) :])
        self._of: list[Bounds | None] = [None] * len(values)
        self._products = [False] * len(values)  # whether a value depends on a multiplication or shift
        turn, changed = 0, True
        while changed:
            changed, turn = False, turn + 1
            for value in values:
                changed |= self._update(value, widen=turn > 3)

    def exact(self, value: Value) -> Bounds | None:
        """The range of a reportable value that exceeds its type, else None."""
        if value.kind not in _REPORTED or not 1 < value.width <= 32:
            return None
        left, right = (self._bounds(each) for each in value.operands)
        exact = _ARITHMETIC[value.kind](left, right, value.width)
        if _inside(exact, _full(value.width)):
            return None
        if value.kind in ("arith.addi", "arith.subi"):
            known = all(_bounded(self._bounds(each), each.width) for each in value.operands)
            if not (known and any(self._products[each.number] for each in value.operands)):
                return None
        return exact

    def describe(self, value: Value) -> str:
        """A constant, or a name with its range."""
        low, high = self._bounds(value)
        if low == high:
            return str(low)
        named = value
        while named.name[1:].isdigit() and named.kind in (*_SAME, "arith.extsi"):
            named = named.operands[0]
        if named.kind == "tt.get_program_id":
            name = f"program_id({'xyz'.index(named.text.split()[0])})"
        else:
            name = re.sub(r"^\d+$", "a value", re.sub(r"_\d+$", "", named.name[1:]))
        return f"{name} ({low} to {high})" if _bounded((low, high), value.width) else f"{name} (any)"

    def _bounds(self, value: Value) -> Bounds:
        return self._of[value.number] or _full(value.width)

    def _update(self, value: Value, widen: bool) -> bool:
        """Update a value's range; returns whether it grew."""
        before = self._of[value.number], self._products[value.number]
        self._products[value.number] = value.kind in ("arith.muli", "arith.shli") or any(
            self._products[each.number] for each in value.sources
        )
        if value.width:
            full, old = _full(value.width), before[0]
            new = self._transfer(value)
            if new is not None:
                new = new if _inside(new, full) else (max(new[0], full[0]), min(new[1], full[1]))
                if old is not None:
                    new = min(new[0], old[0]), max(new[1], old[1])
                    if widen and new != old:
                        new = (full[0] if new[0] < old[0] else old[0]), (full[1] if new[1] > old[1] else old[1])
            self._of[value.number] = new
        return before != (self._of[value.number], self._products[value.number])

    def _transfer(self, value: Value) -> Bounds | None:
        """A value's range from its operands'; None while theirs are unknown."""
        full, kind, text = _full(value.width), value.kind, value.text
        if kind == "arith.constant":
            found = re.match(r"\s*(?:dense<)?(-?\d+|true|false)>?( :|$)", text)
            number = {"true": 1, "false": 0}.get(found[1]) if found else None
            return full if not found else (number, number) if number is not None else (int(found[1]),) * 2
        if kind == "argument":
            return 0, full[1]
        if kind in ("tt.get_program_id", "tt.get_num_programs"):
            count = self._grid["xyz".index(text.split()[0])]
            return (0, count - 1) if kind == "tt.get_program_id" else (1, count)
        if kind == "tt.make_range":
            ends = {name: int(number) for name, number in re.findall(r"(start|end) = (\d+)", text)}
            return ends["start"], ends["end"] - 1
        operands = [self._of[each.number] for each in value.operands]
        if kind == "phi":
            known = [each for each in operands if each is not None]
            return _hull(known) if known else None
        if any(bounds is None and each.width for bounds, each in zip(operands, value.operands, strict=True)):
            return None
        bounds = [_full(value.width) if each is None else each for each in operands]
        if kind == "index":
            return bounds[0][0], max(bounds[0][0], bounds[1][1] - (bounds[1][1] < full[1]))
        if kind in _ARITHMETIC:
            return _ARITHMETIC[kind](bounds[0], bounds[1], value.width)
        if kind in ("arith.extsi", "arith.trunci", "arith.extui", "tt.bitcast", "arith.bitcast"):
            narrow, given = bounds[0], value.operands[0].width
            if kind == "arith.extui" and narrow[0] < 0:
                narrow = 0, (1 << given) - 1
            return narrow if given and _inside(narrow, full) else full
        if kind == "arith.select":
            return _hull(bounds[1:])
        if kind in ("tt.reduce", "tt.scan") and len(operands) == 2:  # one tensor, and the combine region's result
            combined = value.operands[1].kind
            if combined == "arith.addi":
                return min(bounds[0][0], 0) * _MOST, max(bounds[0][1], 0) * _MOST
            return bounds[0] if combined in ("arith.minsi", "arith.maxsi") else full
        if kind in _SAME and all(each.width == value.width for each in value.operands):
            return _hull(bounds)
        return full


_MOST = 1 << 20  # elements of a tensor: Triton's TRITON_MAX_TENSOR_NUMEL
# Operations that only move values.
_SAME = {
    f"tt.{name}"
    for name in ("splat", "unsplat", "expand_dims", "broadcast", "reshape", "trans", "cat", "join", "split")
}


def _full(width: int) -> Bounds:
    return (0, 1) if width == 1 else (-(1 << max(width, 1) - 1), (1 << max(width, 1) - 1) - 1)


def _inside(inner: Bounds, outer: Bounds) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


def _bounded(bounds: Bounds, width: int) -> bool:
    """Whether a range is smaller than its type's."""
    return bounds[0] > _full(width)[0] and bounds[1] < _full(width)[1]


def _hull(bounds: Sequence[Bounds]) -> Bounds:
    return min(each[0] for each in bounds), max(each[1] for each in bounds)


def _corners(operation: Callable[[int, int], int]) -> Callable[[Bounds, Bounds, int], Bounds]:
    """Bounds of an operation that is monotonic in each operand."""

    def bounds(left: Bounds, right: Bounds, width: int) -> Bounds:
        found = [operation(a, b) for a in left for b in right]
        return min(found), max(found)

    return bounds


def _shift_left(left: Bounds, right: Bounds, width: int) -> Bounds:
    by = max(right[0], 0), min(right[1], width)
    return _corners(lambda a, b: a << b)(left, by, width)


def _shift_right(left: Bounds, right: Bounds, width: int) -> Bounds:
    by = max(right[0], 0), min(max(right[1], 0), width)
    return _corners(lambda a, b: a >> b)(left, by, width)


def _shift_right_unsigned(left: Bounds, right: Bounds, width: int) -> Bounds:
    if left[0] >= 0:
        return _shift_right(left, right, width)
    return (0, (1 << width - right[0]) - 1) if right[0] > 0 else _full(width)


def _quotient(left: Bounds, right: Bounds, width: int) -> Bounds:
    """Rounded towards zero."""
    if right[0] < 1:
        return _full(width)
    return _corners(lambda a, b: abs(a) // b * (1 if a >= 0 else -1))(left, right, width)


def _remainder(left: Bounds, right: Bounds, width: int) -> Bounds:
    """It has the sign of the dividend."""
    largest = max(abs(right[0]), abs(right[1]), 1) - 1
    return (0 if left[0] >= 0 else -min(largest, -left[0])), (0 if left[1] <= 0 else min(largest, left[1]))


def _and(left: Bounds, right: Bounds, width: int) -> Bounds:
    positive = [each[1] for each in (left, right) if each[0] >= 0]
    return (0, min(positive)) if positive else _full(width)


def _or(left: Bounds, right: Bounds, width: int) -> Bounds:
    if min(left[0], right[0]) < 0:
        return _full(width)
    return 0, (1 << max(left[1].bit_length(), right[1].bit_length())) - 1


def _unsigned(operation: Callable[[Bounds, Bounds, int], Bounds]) -> Callable[[Bounds, Bounds, int], Bounds]:
    def bounds(left: Bounds, right: Bounds, width: int) -> Bounds:
        return operation(left, right, width) if min(left[0], right[0]) >= 0 else _full(width)

    return bounds


_ARITHMETIC: dict[str, Callable[[Bounds, Bounds, int], Bounds]] = {
    "arith.addi": lambda a, b, width: (a[0] + b[0], a[1] + b[1]),
    "arith.subi": lambda a, b, width: (a[0] - b[1], a[1] - b[0]),
    "arith.muli": _corners(lambda a, b: a * b),
    "arith.shli": _shift_left,
    "arith.shrsi": _shift_right,
    "arith.shrui": _shift_right_unsigned,
    "arith.divsi": _quotient,
    "arith.divui": _unsigned(_quotient),
    "arith.remsi": _remainder,
    "arith.remui": _unsigned(_remainder),
    "arith.minsi": _corners(min),
    "arith.maxsi": _corners(max),
    "arith.minui": _unsigned(_corners(min)),
    "arith.maxui": _unsigned(_corners(max)),
    "arith.andi": _and,
    "arith.ori": _or,
    "arith.xori": _or,
}
