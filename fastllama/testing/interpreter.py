"""Repairs of Triton's NumPy interpreter: exact bf16 and fp8, NumPy 2.4 and newer, fast calls of jit functions.

Without them bf16 is wrong unless it is only loaded, stored or compared for equality: casts truncate, and + - * and dot
work on bit patterns (docs/kernels/testing.md lists the repairs).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import triton.language as tl

from fastllama import env
from fastllama.testing import floats, ptx, selftest, triton_api
from fastllama.testing.floats import Array
from fastllama.testing.triton_api import interpreter

_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)
_Handle = interpreter.TensorHandle


def _format(handle_or_type: Any) -> str:
    """Triton's name of an element type: "bf16", "fp8e4nv", "fp32", "int32", ..."""
    name: str = getattr(handle_or_type, "dtype", handle_or_type).scalar.name
    return name


def _values(handle: Any) -> Array:
    """A handle's values, in float32 where NumPy lacks the format."""
    data: Array = handle.data
    return floats.widen(data, _format(handle)) if _format(handle) in floats.NAMES else data


def _bf16(values: Array) -> Any:
    return _Handle(floats.narrow(values, "bf16"), tl.bfloat16)


class RepairedBuilder(interpreter.InterpreterBuilder):
    """The interpreter's operations that are wrong in the stock builder, rounded once, as on a GPU."""

    def binary_op(self, lhs: Any, rhs: Any, op: Callable[..., Array]) -> Any:
        if _format(lhs) == "bf16" and op not in _BITWISE:
            result = op(_values(lhs), _values(rhs))
            return _Handle(result, tl.int1) if result.dtype == np.bool_ else _bf16(result)
        handle = super().binary_op(lhs, rhs, op)
        # A comparison with the operands' type could be neither broadcast nor used as a mask.
        return _Handle(handle.data, tl.int1) if handle.data.dtype == np.bool_ else handle

    def ternary_op(self, lhs: Any, rhs: Any, other: Any, op: Callable[..., Array]) -> Any:
        if _format(other) == "bf16" and op is not np.where:
            return _bf16(op(_values(lhs), _values(rhs), _values(other)))
        return super().ternary_op(lhs, rhs, other, op)

    # NumPy's exp and log in fp32 have errors of up to three ulps, which depend on the processor.
    def unary_op(self, arg: Any, op: Callable[..., Array]) -> Any:
        if _format(arg) == "bf16":
            return _bf16(op(_values(arg)))
        if _format(arg) == "fp32":
            return _Handle(op(arg.data.astype(np.float64)).astype(np.float32), arg.dtype.scalar)
        return super().unary_op(arg, op)

    # Without propagate_nan, the operand that is not NaN is returned.
    def create_minnumf(self, lhs: Any, rhs: Any) -> Any:
        return self.binary_op(lhs, rhs, np.fmin)

    def create_maxnumf(self, lhs: Any, rhs: Any) -> Any:
        return self.binary_op(lhs, rhs, np.fmax)

    def create_fma(self, x: Any, y: Any, z: Any) -> Any:
        if _format(z) == "bf16":
            return _Handle(floats.fma_bf16(_values(x), _values(y), _values(z)), tl.bfloat16)
        if _format(z) in ("fp16", "fp32"):
            return _Handle(floats.fma(x.data, y.data, z.data).astype(z.data.dtype), z.dtype.scalar)
        return super().create_fma(x, y, z)

    def create_dot(self, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        if _format(a) in (*floats.NAMES, "fp16"):
            product = np.matmul(_values(a), _values(b), dtype=np.float32)
            return _Handle((product + d.data).astype(d.data.dtype), d.dtype.scalar)
        return super().create_dot(a, b, d, *precision)

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        source, target = _format(src), _format(dst_type)
        if source == target:
            return _Handle(src.data, dst_type.scalar)
        if target in floats.NAMES:
            return _Handle(floats.narrow(_values(src).astype(np.float32), target), dst_type.scalar)
        if source in floats.NAMES:
            return _Handle(_values(src).astype(interpreter._get_np_dtype(dst_type)), dst_type.scalar)
        return super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        to_nearest = rounding_mode in (None, interpreter._ir.ROUNDING_MODE.RTNE)
        known = (*floats.NAMES, "fp16", "fp32", "fp64")
        if to_nearest and _format(src) in known and _format(dst_type) in known:
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def get_bf16(self, value: float) -> Any:
        return _bf16(np.array([value], dtype=np.float32))

    def create_inline_asm(
        self, asm: str, constraints: str, values: list[Any], types: list[Any], is_pure: bool, pack: int
    ) -> Any:
        dtypes = [interpreter._get_np_dtype(each) for each in types]
        results = ptx.elementwise(asm, constraints, [value.data for value in values], dtypes, pack)
        return _InlineAssembly([_Handle(data, each.scalar) for data, each in zip(results, types, strict=True)])


class _InlineAssembly:
    """Replaces the compiler's call object: returns one result after another."""

    def __init__(self, results: list[Any]) -> None:
        self.get_result = results.__getitem__


class _InFloat32:
    """Reductions and scans of bf16 in float32, rounded once at the end (the GPU rounds in every step)."""

    def apply_impl(self, tensors: tuple[Any, ...]) -> Any:
        small = [_format(tensor.handle) == "bf16" for tensor in tensors]
        if not any(small):
            return super().apply_impl(tensors)  # type: ignore[misc]
        wide = tuple(
            self.to_tensor(_values(tensor.handle), tl.float32) if is_small else tensor  # type: ignore[attr-defined]
            for tensor, is_small in zip(tensors, small, strict=True)
        )
        results = super().apply_impl(wide)  # type: ignore[misc]
        results = list(results) if isinstance(results, (list, tuple)) else [results]
        for i, is_small in enumerate(small[: len(results)]):
            if is_small and _format(results[i].handle) == "fp32":
                wide_type = results[i].type
                narrow_type = tl.block_type(tl.bfloat16, wide_type.shape) if wide_type.is_block() else tl.bfloat16
                results[i] = tl.core.tensor(_bf16(results[i].handle.data), narrow_type)
        return results


class _Reduce(_InFloat32, interpreter.ReduceOps):
    def apply_impl(self, tensors: tuple[Any, ...]) -> Any:
        if self.combine_fn is not tl.standard._xor_combine:
            return super().apply_impl(tensors)
        # tl.sort uses these, and the stock interpreter combines element by element (50 us each).
        data = tensors[0].handle.data
        found = np.bitwise_xor.reduce(data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(found, tensors[0].dtype)


class _Scan(_InFloat32, interpreter.ScanOps):
    pass


class RepairedExecutor(interpreter.GridExecutor):
    """One launch, without floating-point warnings: masked-off lanes may overflow and divide by zero, as on a GPU."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        with np.errstate(all="ignore"):
            super().__call__(*args, **kwargs)


class _PatchOnce:
    """Patches triton.language once per launch; Triton does so in every call of a jit function (0.15 ms)."""

    def __init__(self) -> None:
        self._stock = interpreter._patch_lang
        self._modules: dict[Any, frozenset[int]] = {}
        self._patched: set[frozenset[int]] = set()

    def executor(self, cls: type) -> Callable[..., Any]:
        """An executor class that resets the state before each launch."""

        def start(*args: Any, **kwargs: Any) -> Any:
            self._patched.clear()
            return cls(*args, **kwargs)

        return start

    def __call__(self, fn: Any) -> Any:
        modules = self._modules.get(fn)
        if modules is None:
            visible = [value for value in fn.__globals__.values() if inspect.ismodule(value)]
            modules = self._modules[fn] = frozenset(id(value) for value in visible if value in (tl, tl.core))
        if modules in self._patched:
            return self
        self._patched.add(modules)
        return self._stock(fn)

    def restore(self) -> None:
        """Mark triton.language as not patched."""


def _patch_tensor(stock: Callable[..., None], tensor: Any, scope: Any) -> None:
    stock(tensor, scope)
    # NumPy 2.4 rejects int() of an array with dimensions, which Triton before 3.7 needs for range(n).
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


@contextmanager
def repaired() -> Iterator[None]:
    """Repair the interpreter inside the block; blocks may be nested. Not thread-safe, as Triton's own is not.

    Raises RuntimeError when TRITON_INTERPRET is not set, or the repairs do not fit this Triton's interpreter.
    """
    if not env.triton_interpret():
        raise RuntimeError("Triton kernels run in the interpreter only where TRITON_INTERPRET=1 before Python starts")
    builder = interpreter.interpreter_builder
    if isinstance(builder, RepairedBuilder):
        yield
        return
    triton_api.check_version()
    once = _PatchOnce()
    stock_tensor = interpreter._patch_lang_tensor
    replaced = {
        "GridExecutor": once.executor(RepairedExecutor),
        "ReduceOps": _Reduce,
        "ScanOps": _Scan,
        "_patch_lang": once,
        "_patch_lang_tensor": lambda tensor, scope: _patch_tensor(stock_tensor, tensor, scope),
    }
    with ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(mock.patch.object(interpreter, name, value))
        stack.enter_context(swapped(builder, RepairedBuilder))
        # The stock interpreter checks each addition for overflow and ignores the result.
        quick = replace(builder.options, sanitize_overflow=False)
        stack.enter_context(mock.patch.object(builder, "options", quick))
        selftest.check_repairs()
        yield


@contextmanager
def swapped(instance: Any, cls: type) -> Iterator[None]:
    """Change an object's class inside the block: kernels keep a reference to the builder, so it cannot be replaced."""
    before = instance.__class__
    instance.__class__ = cls
    try:
        yield
    finally:
        instance.__class__ = before
