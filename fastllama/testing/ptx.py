"""A small PTX interpreter for tl.inline_asm_elementwise: straight-line 32-bit assembly on NumPy arrays."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastllama.testing import floats
from fastllama.testing.floats import Array

U32 = np.uint32


def _shift_left(a: Array, by: Array) -> Array:
    return np.where(by < 32, a << (by & U32(31)), U32(0))  # PTX clamps the distance, NumPy leaves it undefined


def _shift_right(a: Array, by: Array) -> Array:
    return np.where(by < 32, a >> (by & U32(31)), U32(0))


def _shift_right_signed(a: Array, by: Array) -> Array:
    return (a.view(np.int32) >> np.minimum(by, 31).astype(np.int32)).view(U32)


def _prmt(a: Array, b: Array, selector: Array) -> Array:
    """Each byte of the result is one of the eight bytes of (b, a), or its replicated sign bit."""
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.zeros_like(a)
    for i in range(4):
        pick = (selector >> U32(4 * i)) & U32(15)
        byte = ((both >> ((pick & U32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(255)).astype(U32)
        byte = np.where(pick & U32(8), np.where(byte & U32(128), U32(255), U32(0)), byte)
        result |= byte << U32(8 * i)
    return result


def _lop3(a: Array, b: Array, c: Array, table: Array) -> Array:
    """Any logical function of three bits: bit (4a + 2b + c) of the table."""
    result = np.zeros_like(a)
    for k in range(8):
        here = (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
        result |= np.where(table >> U32(k) & U32(1), here, U32(0))
    return result


_LOGIC: dict[str, Callable[..., Array]] = {
    "mov.b32": lambda a: a,
    "mov.u32": lambda a: a,
    "prmt.b32": _prmt,
    "lop3.b32": _lop3,
    "shl.b32": _shift_left,
    "shr.b32": _shift_right,
    "shr.u32": _shift_right,
    "shr.s32": _shift_right_signed,
    "not.b32": lambda a: ~a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    **{f"add.{kind}": lambda a, b: a + b for kind in ("u32", "s32")},
    **{f"sub.{kind}": lambda a, b: a - b for kind in ("u32", "s32")},
}
_ARITHMETIC: dict[str, Callable[..., Array]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "fma": floats.fma,
}


def _halves(kind: str, operation: str, operands: list[Array]) -> Array:
    """An operation on two 16-bit floats per register, each result rounded once."""
    result = np.zeros_like(operands[0])
    for shift in (0, 16):
        bits = [((operand >> U32(shift)) & U32(0xFFFF)).astype(np.uint16) for operand in operands]
        if kind == "bf16x2":
            values = [floats.widen(each, "bf16") for each in bits]
            if operation == "fma":
                half = floats.fma_bf16(*values)
            else:
                half = floats.narrow(_ARITHMETIC[operation](*values), "bf16")
        else:
            wide = [each.view(np.float16).astype(np.float32) for each in bits]
            half = _ARITHMETIC[operation](*wide).astype(np.float16).view(np.uint16)
        result |= half.astype(U32) << U32(shift)
    return result


def _single(operation: str, operands: list[Array]) -> Array:
    values = [operand.view(np.float32) for operand in operands]
    return _ARITHMETIC[operation](*values).astype(np.float32).view(U32)


def _instruction(opcode: str, operands: list[Array]) -> Array:
    if opcode in _LOGIC:
        return _LOGIC[opcode](*operands)
    operation, *modifiers = opcode.split(".")
    kind = modifiers[-1] if modifiers else ""
    if operation in _ARITHMETIC and set(modifiers[:-1]) <= {"rn"}:
        if kind in ("f16x2", "bf16x2"):
            return _halves(kind, operation, operands)
        if kind == "f32":
            return _single(operation, operands)
    raise NotImplementedError(f"the interpreter's PTX has no instruction {opcode!r}")


def run(asm: str, num_outputs: int, inputs: Sequence[Array]) -> list[Array]:
    """The registers $0 .. $num_outputs-1 after `asm`; inputs: uint32 arrays of one shape, the registers after them.

    Raises NotImplementedError for an unknown instruction, ValueError for a register that was never written.
    """
    shape = np.broadcast_shapes(*(each.shape for each in inputs))
    registers = {f"${num_outputs + i}": np.broadcast_to(each, shape).astype(U32) for i, each in enumerate(inputs)}

    def operand(token: str) -> Array:
        if token in registers:
            return registers[token]
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", token):
            return np.full(shape, int(token[2:], 16), U32)
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)[uU]?", token):
            return np.full(shape, int(token.rstrip("uU"), 0) & 0xFFFFFFFF, U32)
        raise ValueError(f"PTX register {token!r} is read before it is written")

    for statement in re.split(r"[;{}]", re.sub(r"//[^\n]*", "", asm)):
        statement = statement.strip()
        if not statement or statement.startswith(".reg"):
            continue
        opcode, _, rest = statement.partition(" ")
        target, *sources = (token.strip() for token in rest.split(","))
        registers[target] = _instruction(opcode, [operand(token) for token in sources])
    return [operand(f"${i}") for i in range(num_outputs)]


def elementwise(
    asm: str, constraints: str, operands: Sequence[Array], dtypes: Sequence[np.dtype[Any]], pack: int
) -> list[Array]:
    """tl.inline_asm_elementwise: `pack` neighbouring elements at a time, those under 32 bits packed into registers.

    operands: arrays of one shape, elements of at most 32 bits. dtypes: of the results. Returns arrays of that shape.
    """
    shape = operands[0].shape
    registers: list[Array] = []
    for each in operands:
        registers += _pack(np.ascontiguousarray(each).reshape(-1, pack))
    outputs = run(asm, constraints.count("="), registers)
    results = []
    for dtype in dtypes:
        count = max(1, pack * dtype.itemsize // 4)
        words = np.ascontiguousarray(np.stack(outputs[:count], axis=1))
        del outputs[:count]
        elements = words.view(dtype) if pack * dtype.itemsize >= 4 else words.astype(dtype)
        results.append(elements.reshape(shape))
    return results


def _pack(groups: Array) -> list[Array]:
    """[n, pack] elements as 32-bit registers, [n] each."""
    bits = groups.view(f"u{groups.itemsize}")
    words = np.ascontiguousarray(bits).view(U32) if bits[0].nbytes >= 4 else bits.astype(U32)
    return [words[:, i] for i in range(words.shape[1])]
