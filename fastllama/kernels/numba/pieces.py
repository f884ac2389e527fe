"""Kernels whose iterations threads share, in pieces: the functions inside a kernel, and inside a helper thread.

    @jit
    def kernel(region, *args):
        a, b = args
        first, last = enter(region, args)
        while first < last:
            for i in range(first, last): ...
            first, last = proceed(region)
        return leave(region)

Every free thread, the kernel's caller included, claims the next piece; helpers enter the same kernel with the same
arguments, which are numbers and addresses: an array would be freed by the last thread that leaves. threads.py has the
threads. A region is (address of the state, iterations of a piece, all iterations, turns to wait at the end) for a
caller, (that address, first and last iteration, -1 - its number) for a helper that enters, and (0, 0, all iterations,
0) alone. A helper may still be in the kernel of one region when the next has begun: regions have numbers, and it takes
pieces of its own only.
"""

from __future__ import annotations

import platform

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic

from fastllama.kernels.numba.numerics import jit

# The state, in words of 8 bytes; words that different threads write are 128 bytes apart.
_LEFT, FINISHED = 0, 16  # the number of the region and, in the low 32 bits, its unclaimed pieces; finished pieces
_ENTRY, _COUNT, _GRAIN, PIECES, HELPERS, FAILED, _IN_HAND = range(32, 39)
_ARGS = 48
WORDS = _ARGS + 128
_LOW = (1 << 32) - 1
_LARGEST_NUMBER = (1 << 31) - 1

_I64 = ir.IntType(64)
_ENTRY_TYPE = ir.FunctionType(ir.IntType(32), [_I64] * 4)  # (state, first, last, -1 - number) -> Numba's status
_PLAIN = (types.Number, types.Boolean)
# A hint to the core that it waits; Numba's LLVM has no assembler.
_HINTS = {
    "x86_64": ("llvm.x86.sse2.pause", []),
    "AMD64": ("llvm.x86.sse2.pause", []),
    "aarch64": ("llvm.aarch64.hint", [ir.IntType(32)(1)]),
    "arm64": ("llvm.aarch64.hint", [ir.IntType(32)(1)]),
}


def _word(builder, state, index):
    return builder.inttoptr(builder.add(state, builder.mul(index, _I64(8))), _I64.as_pointer())


@intrinsic
def _get(context, state, index):
    """A word of the state, loaded with acquire order."""

    def generate(context, builder, signature, args):
        return builder.load_atomic(_word(builder, *args), "acquire", 8)

    return types.int64(types.int64, types.int64), generate


@intrinsic
def _set(context, state, index, value):
    def generate(context, builder, signature, args):
        state, index, value = args
        builder.store_atomic(value, _word(builder, state, index), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def _add(context, state, index, value):
    def generate(context, builder, signature, args):
        state, index, value = args
        builder.atomic_rmw("add", _word(builder, state, index), value, "acq_rel")
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def _replace(context, state, index, expected, new):
    """Compare and swap a word; returns whether it was as expected."""

    def generate(context, builder, signature, args):
        state, index, expected, new = args
        result = builder.cmpxchg(_word(builder, state, index), expected, new, "acq_rel", "acquire")
        return builder.extract_value(result, 1)

    return types.boolean(*[types.int64] * 4), generate


@intrinsic
def _pause(context):
    def generate(context, builder, signature, args):
        if platform.machine() in _HINTS:
            name, given = _HINTS[platform.machine()]
            kind = ir.FunctionType(ir.VoidType(), [each.type for each in given])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, name), given)
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _run(context, state, first, last, role):
    """Run a piece of a region, and others while there are any. Returns Numba's status, 0 if nothing was raised."""

    def generate(context, builder, signature, args):
        entry = builder.inttoptr(builder.load(_word(builder, args[0], _I64(_ENTRY))), _ENTRY_TYPE.as_pointer())
        return builder.sext(builder.call(entry, args), _I64)

    return types.int64(*[types.int64] * 4), generate


@jit
def _claim(state, number):
    """The iterations of an unclaimed piece of a region, from the first to before the last; none if all are claimed."""
    left = _get(state, _LEFT)
    while left & _LOW > 0 and left >> 32 == number:
        if _replace(state, _LEFT, left, left - 1):
            # The region cannot end before this piece, so the state is still that of this region.
            first = (_get(state, PIECES) - (left & _LOW)) * _get(state, _GRAIN)
            return first, min(first + _get(state, _GRAIN), _get(state, _COUNT))
        left = _get(state, _LEFT)
    return 0, 0


@jit
def _claim_for_caller(state):
    first, last = _claim(state, _get(state, _LEFT) >> 32)
    _set(state, _IN_HAND, first < last)
    return first, last


def _enter(region):
    state, first, last, patience = region
    if state == 0 or patience < 0:  # alone, or a helper with its first piece
        return first, last
    grain = first
    pieces = (last + grain - 1) // grain
    _set(state, _COUNT, last)
    _set(state, _GRAIN, grain)
    _set(state, PIECES, pieces)
    _set(state, FAILED, 0)
    _set(state, FINISHED, 0)
    number = (_get(state, _LEFT) >> 32) + 1 & _LARGEST_NUMBER
    _set(state, _LEFT, (number << 32) + pieces)
    return _claim_for_caller(state)


@intrinsic
def enter(typing, region, args):
    """The first iterations for this thread, from the first to before the last. To be called by the kernel itself.

    A caller with helpers also makes them enter the kernel with the same arguments.
    """
    signature = types.UniTuple(types.int64, 2)(region, args)
    for each in args:
        if not isinstance(each.dtype if isinstance(each, types.UniTuple) else each, _PLAIN):
            raise TypingError(f"a kernel on several threads has an argument of type {each}; legal: numbers, addresses")

    def generate(context, builder, signature, values):
        kinds, kernel = signature.args, builder.function
        region, given = values
        size = context.get_abi_sizeof(given.type)
        if size > 8 * (WORDS - _ARGS):
            raise ValueError(f"the arguments of {kernel.name} take {size} bytes; legal: {8 * (WORDS - _ARGS)}")
        entry = ir.Function(builder.module, _ENTRY_TYPE, f"{kernel.name}.entry")
        entry.linkage = "internal"
        inner = ir.IRBuilder(entry.append_basic_block())
        helpers = context.make_tuple(inner, kinds[0], entry.args)
        place = inner.inttoptr(inner.add(entry.args[0], _I64(8 * _ARGS)), given.type.as_pointer())
        status, _ = context.call_conv.call_function(inner, kernel, types.int64, kinds, [helpers, inner.load(place)])
        inner.ret(status.code)
        state, _, _, patience = cgutils.unpack_tuple(builder, region, 4)
        shared = builder.and_(builder.icmp_signed("!=", state, _I64(0)), builder.icmp_signed(">=", patience, _I64(0)))
        with builder.if_then(shared):
            builder.store(given, builder.inttoptr(builder.add(state, _I64(8 * _ARGS)), given.type.as_pointer()))
            builder.store(builder.ptrtoint(entry, _I64), _word(builder, state, _I64(_ENTRY)))
        return context.compile_internal(builder, _enter, signature.return_type(kinds[0]), [region])

    return signature, generate


@jit
def proceed(region):
    """Finish this thread's piece and claim the next: its first iteration and its end, equal if there are no more."""
    state, _, _, patience = region
    if state == 0:
        return 0, 0
    _add(state, FINISHED, 1)
    return _claim(state, -1 - patience) if patience < 0 else _claim_for_caller(state)


@jit
def leave(region):
    """The result of a kernel: how many pieces other threads have not finished after `patience` turns."""
    state, _, _, patience = region
    if state == 0 or patience < 0:
        return 0
    pieces = _get(state, PIECES)
    while patience > 0 and _get(state, FINISHED) < pieces:
        _pause()
        patience -= 1
    return pieces - _get(state, FINISHED)


@jit
def serve(state, number, patience):
    """Run pieces until there was none for `patience` turns."""
    turns = patience
    while turns > 0:
        region = _get(state, _LEFT) >> 32
        first, last = _claim(state, region) if number < _get(state, HELPERS) else (0, 0)
        if first < last:
            if _run(state, first, last, -1 - region) != 0:
                _set(state, FAILED, 1)
                _add(state, FINISHED, 1)
            turns = patience
        else:
            _pause()
            turns -= 1


@jit
def give_up(state):
    """Count the pieces of a region that no thread will finish as finished: all unclaimed ones, and the caller's."""
    left = _get(state, _LEFT)
    while not _replace(state, _LEFT, left, left & ~_LOW):
        left = _get(state, _LEFT)
    _add(state, FINISHED, (left & _LOW) + _get(state, _IN_HAND))
    _set(state, _IN_HAND, 0)


@jit
def wait_turns(count):
    for _ in range(count):
        _pause()
