"""Checks every memory access of Triton kernels in the interpreter, for faults that a GPU does not report.

with checks() as report:
    my_launcher(x, out)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch

from fastllama.errors import check_choice
from fastllama.testing.floats import Array
from fastllama.testing.interpreter import RepairedBuilder, RepairedExecutor, repaired, swapped
from fastllama.testing.monitor import TAG, CheckedLaunch, CheckedRun, CheckError, Monitor
from fastllama.testing.triton_api import TritonSemantic, interpreter

__all__ = ["CheckError", "CheckedLaunch", "CheckedRun", "checks", "same_in_any_order"]

ORDERS = ("forward", "reverse", "shuffle")


class _Memory:
    """Replaces the C module that performs the interpreter's loads, stores and atomics."""

    def __init__(self, stock: Any, monitor: Monitor) -> None:
        self._stock, self._monitor = stock, monitor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)

    def load(self, pointers: Array, mask: Array, other: Array, dtype: Any) -> Any:
        return self._stock.load(self._monitor.access("load", pointers, mask, dtype.itemsize), mask, other, dtype)

    def store(self, pointers: Array, value: Array, mask: Array) -> Any:
        return self._stock.store(self._monitor.access("store", pointers, mask, value.itemsize, value), value, mask)

    def atomic_rmw(self, op: Any, pointers: Array, value: Array, mask: Array, semantics: Any) -> Any:
        plain = self._monitor.access("atomic", pointers, mask, value.itemsize)
        return self._stock.atomic_rmw(op, plain, value, mask, semantics)

    def atomic_cas(self, pointers: Array, compared: Array, value: Array, semantics: Any) -> Any:
        plain = self._monitor.access("atomic", pointers, True, value.itemsize)
        return self._stock.atomic_cas(plain, compared, value, semantics)


class _CheckedBuilder(RepairedBuilder):
    monitor: Monitor

    def set_grid_dim(self, *grid: int) -> None:
        super().set_grid_dim(*grid)
        self.monitor.permute(grid)  # type: ignore[arg-type]

    def set_grid_idx(self, *program: int) -> None:
        super().set_grid_idx(*self.monitor.next_program())

    def create_assert(self, condition: Any, message: str) -> None:
        held = np.asarray(condition.data, dtype=bool)
        if not held.all():
            self.monitor.fail(f"device_assert: {message}: {int((~held).sum())} of {held.size} lanes")


class _CheckedExecutor(RepairedExecutor):
    monitor: Monitor

    def _init_args_hst(self, args_dev: Any, kwargs: Any) -> Any:
        args, named = super()._init_args_hst(args_dev, kwargs)
        self.monitor.start(self.fn.__name__, [*zip(self.arg_names, args, strict=False), *named.items()])
        return args, named

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().__call__(*args, **kwargs)
        except interpreter.InterpreterError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, CheckError):
                cause = cause.__cause__
            if cause is None:
                raise
            raise cause from None
        self.monitor.finish()


def _sanitizer(monitor: Monitor, overflow: bool) -> Callable[..., None]:
    """Replaces the overflow sanitizer that a GPU runs with TRITON_DEBUG=1."""

    def check(semantic: Any, lhs: Any, rhs: Any, operation: Callable[..., Any]) -> None:
        if overflow:
            monitor.overflow(lhs.type.scalar, operation.__name__, lhs.handle.data, rhs.handle.data)

    return check


@contextmanager
def checks(
    *,
    races: bool = True,
    overflow: bool = True,
    order: str = "shuffle",
    seed: int = 0,
    allow_races: Iterable[str] = (),
    memory: Iterable[torch.Tensor] = (),
) -> Iterator[CheckedRun]:
    """Run kernels launched inside the block in the repaired interpreter, checked; the first fault raises CheckError.

    Always: each access lies on elements of its own argument and is aligned to its size; tl.device_assert holds.
    races: two programs of a launch access an address and one writes, or one store writes two values to an address.
    overflow: integer + - * of under 64 bits overflows its type (except tl.add(..., sanitize_overflow=False)).
    order: of the programs, "forward", "reverse" or "shuffle" by `seed`.
    allow_races: parameters whose accesses are ordered in ways that are not recognised (a ticket, a lock).
    memory: tensors that kernels access through loaded addresses.
    """
    check_choice("order", order, ORDERS)
    monitor = Monitor(order, seed, races, allow_races, memory)
    with repaired(), ExitStack() as stack:
        builder, convert = interpreter.interpreter_builder, interpreter._implicit_cvt

        def tagged(argument: Any) -> Any:
            value = convert(argument)
            tag = monitor.tags.get(id(argument))
            if tag is not None:
                value.handle.data = value.handle.data | np.uint64(tag << TAG)
            return value

        executor = type("CheckedExecutor", (_CheckedExecutor,), {"monitor": monitor})
        checked = type("CheckedBuilder", (_CheckedBuilder,), {"monitor": monitor})
        replaced = [
            (interpreter, "_interpreter", _Memory(interpreter._interpreter, monitor)),
            (interpreter, "_implicit_cvt", tagged),
            (interpreter, "GridExecutor", interpreter._patch_lang.executor(executor)),
            (TritonSemantic, "binary_op_sanitize_overflow_impl", _sanitizer(monitor, overflow)),
            (builder, "options", replace(builder.options, debug=True)),
        ]
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(swapped(builder, checked))
        yield monitor.report


def same_in_any_order(run: Callable[[], Any], *, seeds: Iterable[int] = (0, 1)) -> Any:
    """Call run() with its programs forward, in reverse and shuffled; returns its result, a tensor or several.

    `run` allocates its outputs itself. Raises CheckError unless all results are bit-identical.
    """
    expected = None
    for order, seed in [("forward", 0), ("reverse", 0), *(("shuffle", seed) for seed in seeds)]:
        with checks(order=order, seed=seed):
            found = run()
        if expected is None:
            expected = found
            continue
        pairs = [(expected, found)] if torch.is_tensor(found) else list(zip(expected, found, strict=True))
        for i, (one, other) in enumerate(pairs):
            differ = (one != other) & ~((one != one) & (other != other))
            if differ.any():
                raise CheckError(
                    f"result {i} depends on the order of the programs: {int(differ.sum())} of {differ.numel()} "
                    f"elements differ between forward and {order}"
                )
    return expected
