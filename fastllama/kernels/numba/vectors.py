"""LLVM's vectors by address: building blocks of intrinsics, for loops that Numba does not vectorise so."""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils

I8, I16, I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)
FLOATS, WORDS, PAIRS = ir.VectorType(ir.FloatType(), 8), ir.VectorType(I32, 8), ir.VectorType(I16, 16)
WIDE = ir.VectorType(I32, 16)  # of PAIRS


def splat(kind, value):
    """A vector of equal numbers."""
    return ir.Constant(kind, [value] * kind.count)


def broadcast(builder, number):
    """A float32 as a vector of 8."""
    vector = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), number, I32(0))
    return builder.shuffle_vector(vector, vector, splat(WORDS, 0))


def every_second(builder, vector, first):
    """Every second of a vector's sixteen elements, from `first`, 0 or 1."""
    return builder.shuffle_vector(vector, vector, ir.Constant(WORDS, [*range(first, 16, 2)]))


def math(builder, name, *vectors):
    """A function of LLVM's for vectors of float32."""
    kind = vectors[0].type
    function = ir.FunctionType(kind, [kind] * len(vectors))
    found = cgutils.get_or_insert_function(builder.module, function, f"llvm.{name}.v{kind.count}f32")
    return builder.call(found, vectors)


def at(builder, address, offset, kind):
    """A pointer to `kind`, `offset` bytes on from an address."""
    if isinstance(offset, int):
        offset = address.type(offset)
    return builder.inttoptr(builder.add(address, offset), kind.as_pointer())


def read(builder, address, offset, kind):
    """The value of type `kind`, `offset` bytes on from an address, at any alignment."""
    return builder.load(at(builder, address, offset, kind), align=1)


def fetch(builder, pointer):
    """Prefetch the cache line of a pointer to bytes, to read it, in all caches. Lines past memory's end do no harm."""
    kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), *[I32] * 3])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [pointer, *map(I32, (0, 3, 1))])
