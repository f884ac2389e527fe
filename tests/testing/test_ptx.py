"""The mini-PTX, instruction by instruction, and through tl.inline_asm_elementwise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from fastllama.testing import ptx
from fastllama.testing.checks import checks

A, B, C = 0x81020304, 0x05060788, 0xF0F0FF00


def words(*values: int) -> list[np.ndarray]:
    return [np.array([value & 0xFFFFFFFF], np.uint32) for value in values]


@pytest.mark.parametrize(
    ("asm", "inputs", "expected"),
    [
        ("mov.b32 $0, 0x12345678;", (0,), 0x12345678),
        ("mov.b32 $0, 0f3F800000;", (0,), 0x3F800000),
        ("and.b32 $0, $1, $2;", (A, B), A & B),
        ("or.b32 $0, $1, $2;", (A, B), A | B),
        ("xor.b32 $0, $1, 0xffffffff;", (A,), A ^ 0xFFFFFFFF),
        ("not.b32 $0, $1;", (A,), A ^ 0xFFFFFFFF),
        ("shl.b32 $0, $1, 4;", (A,), (A << 4) & 0xFFFFFFFF),
        ("shl.b32 $0, $1, 32;", (A,), 0),
        ("shr.b32 $0, $1, 4;", (A,), A >> 4),
        ("shr.u32 $0, $1, 40;", (A,), 0),
        ("shr.s32 $0, $1, 4;", (A,), (A >> 4) | 0xF0000000),
        ("shr.s32 $0, $1, 99;", (A,), 0xFFFFFFFF),
        ("add.u32 $0, $1, $2;", (A, 0x80000000), 0x01020304),
        ("sub.s32 $0, $1, -1;", (A,), A + 1),
        ("prmt.b32 $0, $1, $2, 0x7410;", (A, B), 0x05880304),
        ("prmt.b32 $0, $1, $2, 0xB3C4;", (A, B), 0xFF81FF88),  # 8 and more: the byte's sign
        ("lop3.b32 $0, $1, $2, $3, 0xea;", (A, B, C), (A & B) | C),
        ("lop3.b32 $0, $1, $2, $3, 0x96;", (A, B, C), A ^ B ^ C),
        ("{ .reg .b32 t; and.b32 t, $1, 15; // low\n or.b32 $0, t, 0x40; }", (A,), 0x44),
        ("add.f32 $0, $1, $2;", (0x3F800000, 0x40000000), 0x40400000),
        ("fma.rn.f32 $0, $1, $1, $2;", (0x3F800001, 0xBF800002), 0x28800000),  # (1 + e)^2 - (1 + 2e) = e^2
        ("sub.f16x2 $0, $1, $2;", (0x40003C00, 0x3C003C00), 0x3C000000),
        ("fma.rn.f16x2 $0, $1, $2, $3;", (0x40003C00, 0x42004200, 0x3C003C00), 0x47004400),
        ("mul.bf16x2 $0, $1, $2;", (0x40003F80, 0x40404040), 0x40C04040),
        ("sub.rn.bf16x2 $0, $1, $2;", (0x43084307, 0x43084308), 0x0000BF80),
        ("fma.rn.bf16x2 $0, $1, $1, $2;", (0x3F813F81, 0xBF82BF82), 0x38803880),
    ],
)
def test_instructions(asm: str, inputs: tuple[int, ...], expected: int) -> None:
    (found,) = ptx.run(asm, 1, words(*inputs))
    assert hex(int(found[0])) == hex(expected)


def test_several_outputs() -> None:
    found = ptx.run("and.b32 $0, $2, 15; shr.b32 $1, $2, 4;", 2, words(0xAB))
    assert [int(each[0]) for each in found] == [0xB, 0xA]


@pytest.mark.parametrize("asm", ["sin.approx.f32 $0, $1;", "add.sat.f32 $0, $1, $1;", "div.f32 $0, $1, $1;", "bra x;"])
def test_an_unknown_instruction_is_refused(asm: str) -> None:
    with pytest.raises(NotImplementedError, match=rf"has no instruction '{asm.split()[0]}'$"):
        ptx.run(asm, 1, words(1))


def test_a_register_that_was_never_written_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^PTX register 'r9' is read before it is written$"):
        ptx.run("mov.b32 $0, r9;", 1, words(1))


# One program owns all N elements, here and below.
@triton.jit
def swap_kernel(out_ptr, x_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    y = tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $1, 0x0123;", "=r,r", [tl.load(x_ptr + i)], dtype=tl.uint8, is_pure=True, pack=4
    )
    tl.store(out_ptr + i, y)


@triton.jit
def nibbles_kernel(low_ptr, high_ptr, x_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    low, high = tl.inline_asm_elementwise(
        "and.b32 $0, $2, 15; shr.u32 $1, $2, 4;",
        "=r,=r,r",
        [tl.load(x_ptr + i)],
        dtype=(tl.int32, tl.uint32),
        is_pure=True,
        pack=1,
    )
    tl.store(low_ptr + i, low)
    tl.store(high_ptr + i, high)


@triton.jit
def halves_kernel(out_ptr, x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    out = tl.inline_asm_elementwise(
        "fma.rn.bf16x2 $0, $1, $2, $2;", "=r,r,r", [x, y], dtype=tl.bfloat16, is_pure=True, pack=2
    )
    tl.store(out_ptr + i, out)


@pytest.mark.interpreter
class TestInKernels:
    def test_bytes_are_packed_by_fours(self) -> None:
        x = torch.arange(32, dtype=torch.uint8)
        out = torch.empty_like(x)
        with checks():
            swap_kernel[(1,)](out, x, N=32)
        assert torch.equal(out, x.view(8, 4).flip(1).view(32))

    def test_two_results(self) -> None:
        x = torch.arange(-16, 16, dtype=torch.int32)
        low, high = torch.empty_like(x), torch.empty_like(x)
        with checks():
            nibbles_kernel[(1,)](low, high, x, N=32)
        assert torch.equal(low, x & 15)
        assert torch.equal(high, (x.long() & 0xFFFFFFFF).div(16, rounding_mode="floor").int())

    def test_halves_are_packed_by_twos(self) -> None:
        x, y = torch.randn(32).bfloat16(), torch.randn(32).bfloat16()
        out = torch.empty_like(x)
        with checks():
            halves_kernel[(1,)](out, x, y, N=32)
        assert torch.equal(out, (x.double() * y.double() + y.double()).bfloat16())
