"""Each fault planted in a toy kernel is found and named; a kernel without one passes, and its bytes are counted."""

from __future__ import annotations

import re

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from fastllama.testing.checks import CheckError, checks

pytestmark = pytest.mark.interpreter

F32 = torch.float32


def line(kernel: triton.JITFunction, text: str) -> str:
    """ "file:line" of the one line of a kernel that holds `text`."""
    code = kernel.fn.__code__
    with open(code.co_filename, encoding="utf-8") as file:
        lines = file.read().splitlines()
    start = next(i for i, each in enumerate(lines) if each.startswith(f"def {kernel.fn.__name__}("))
    (number,) = (i for i in range(start, start + 12) if text in lines[i])
    return rf"test_checks\.py:{number + 1}$"


# One program owns BLOCK elements.
@triton.jit
def copy_kernel(out_ptr, x_ptr, n, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i + SHIFT, mask=i < n)
    tl.store(out_ptr + i, x, mask=i < n)


def copy(out: torch.Tensor, x: torch.Tensor, n: int, shift: int = 0) -> None:
    copy_kernel[(triton.cdiv(n, 8),)](out, x, n, SHIFT=shift, BLOCK=8)


class TestBounds:
    def test_a_sound_kernel_passes_and_its_bytes_are_counted(self) -> None:
        x, out = torch.randn(20), torch.empty(20)
        with checks() as report:
            copy(out, x, 20)
            copy(out, x, 5)
        assert torch.equal(out, x)
        first, second = report.launches
        assert (first.kernel, first.grid) == ("copy_kernel", (3, 1, 1))
        assert (first.loaded, first.stored, first.updated) == ({"x_ptr": 80}, {"out_ptr": 80}, {})
        assert (second.loaded, second.stored) == ({"x_ptr": 20}, {"out_ptr": 20})
        assert (report.bytes_loaded, report.bytes_stored) == (100, 100)

    def test_a_read_past_the_end(self) -> None:
        """Found although the next argument follows in the same allocation."""
        both = torch.randn(40)
        message = (
            r"^load out of bounds of x_ptr \(float32 \[20\]\): 3 of 4 lanes, the first 4 B past its end; "
            rf"program \(2, 0, 0\) of copy_kernel, {line(copy_kernel, 'tl.load')}"
        )
        with pytest.raises(CheckError, match=message), checks():
            copy(both[20:], both[:20], 20, shift=3)

    def test_a_read_before_the_start(self) -> None:
        with pytest.raises(CheckError, match=r"of x_ptr .*: 2 of 8 lanes, the first 8 B before its start; "), checks():
            copy(torch.empty(20), torch.randn(30)[10:], 20, shift=-2)

    def test_a_write_past_the_end(self) -> None:
        buffer = torch.zeros(24)
        with pytest.raises(CheckError, match=r"^store out of bounds of out_ptr .*: 4 of 8 lanes"), checks():
            copy(buffer[:20], torch.randn(24), 24)
        assert (buffer[20:] == 0).all()

    def test_rows_of_a_wider_buffer(self) -> None:
        """Memory between the rows of a view is not the argument's."""
        buffer = torch.randn(3, 10)
        message = (
            r"of x_ptr \(float32 \[3, 6\], strides \[10, 1\]\): 2 of 8 lanes, the first at byte 24, between its el"
        )
        with pytest.raises(CheckError, match=message), checks():
            copy(torch.empty(8), buffer[:, 2:8], 8)
        with checks():
            copy(torch.empty(6), buffer[:, 2:8], 6)

    def test_what_a_view_leaves_out_of_its_middle_dimension(self) -> None:
        x = torch.randn(2, 3, 8)[:, :2, :4]
        with pytest.raises(CheckError, match=r"4 of 4 lanes, the first at byte 64, between its elements"), checks():
            copy(torch.empty(4), x, 4, shift=16)
        with checks():
            copy(torch.empty(4), x, 4, shift=24)

    @pytest.mark.parametrize(
        "view",
        [
            lambda x: x.view(2, 3, 4).transpose(0, 2),
            lambda x: x.view(2, 3, 4).permute(1, 0, 2),
            lambda x: x.view(24, 1).expand(24, 5),
            lambda x: x.unfold(0, 6, 1),
            lambda x: x.view(1, 24),
        ],
    )
    def test_views_that_reach_every_element(self, view) -> None:
        x = torch.randn(24)
        out = torch.empty(24)
        with checks():
            copy(out, view(x), 24)
        assert torch.equal(out, x)

    def test_every_other_element(self) -> None:
        with pytest.raises(CheckError, match=r"4 of 8 lanes, the first at byte 4, between its elements"), checks():
            copy(torch.empty(8), torch.randn(40)[::2], 8)

    def test_an_empty_argument(self) -> None:
        with pytest.raises(CheckError, match=r"^load out of bounds of x_ptr \(float32 \[0\]\): 4 of 4 lanes"), checks():
            copy(torch.empty(4), torch.randn(0), 4)

    def test_a_wider_access_than_the_element(self) -> None:
        x = torch.zeros(6, dtype=torch.uint8)
        with pytest.raises(CheckError, match=r"of x_ptr .*: 1 of 2 lanes, the first 2 B past its end"), checks():
            copy(torch.empty(2, dtype=torch.int32), triton.reinterpret(x, tl.int32), 2)

    def test_keyword_arguments_and_tuples_are_named(self) -> None:
        with pytest.raises(CheckError, match=r"of x_ptr "), checks():
            copy_kernel[(1,)](n=8, x_ptr=torch.randn(7), out_ptr=torch.empty(8), SHIFT=0, BLOCK=8)
        with pytest.raises(CheckError, match=r"of pair_ptrs\[1\] "), checks():
            pair_kernel[(1,)]((torch.randn(8), torch.randn(7)), BLOCK=8)

    def test_an_access_through_a_helper_is_found_there(self) -> None:
        with pytest.raises(CheckError, match=rf"of x_ptr .*of helped_kernel, {line(helper, 'tl.load')}"), checks():
            helped_kernel[(1,)](torch.empty(8), torch.randn(7), BLOCK=8)

    @pytest.mark.parametrize("kind", ["add", "cas"])
    def test_an_atomic(self, kind: str) -> None:
        count = torch.zeros(8, dtype=torch.int32)
        with checks() as report:
            count_kernel[(3,)](count, 7, KIND=kind)
        assert count.tolist() == [0] * 7 + [3 if kind == "add" else 1]
        assert report.launches[0].updated == {"count_ptr": 12}
        message = rf"^atomic out of bounds of count_ptr .*of count_kernel, {line(count_kernel, f'tl.atomic_{kind}')}"
        with pytest.raises(CheckError, match=message), checks():
            count_kernel[(1,)](count, 8, KIND=kind)

    def test_a_loaded_address(self) -> None:
        """Within declared memory it is checked; elsewhere it is a fault."""
        x, out = torch.randn(8), torch.empty(8)
        table = torch.tensor([x.data_ptr()])
        with checks(memory=[x]) as report:
            table_kernel[(1,)](out, table, BLOCK=8)
        assert torch.equal(out, x)
        assert report.launches[0].loaded == {"table_ptr": 8, "memory[0]": 32}
        with pytest.raises(CheckError, match=r"^load in no argument, the nearest is "), checks():
            table_kernel[(1,)](out, table, BLOCK=8)
        message = r"the nearest is memory\[0\] .*: 1 of 8 lanes, .* 4 B past its end"
        with pytest.raises(CheckError, match=message), checks(memory=[x[:7]]):
            table_kernel[(1,)](out, table, BLOCK=8)


@triton.jit
def count_kernel(count_ptr, at, KIND: tl.constexpr):
    if KIND == "add":
        tl.atomic_add(count_ptr + at, 1)
    else:
        tl.atomic_cas(count_ptr + at, 0, 1)


@triton.jit
def pair_kernel(pair_ptrs, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(pair_ptrs[0] + i, tl.load(pair_ptrs[1] + i))


@triton.jit
def helper(x_ptr, i):
    return tl.load(x_ptr + i)


@triton.jit
def helped_kernel(out_ptr, x_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, helper(x_ptr, i))


@triton.jit
def table_kernel(out_ptr, table_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x_ptr = tl.load(table_ptr).to(tl.pointer_type(tl.float32))
    tl.store(out_ptr + i, tl.load(x_ptr + i))


@triton.jit
def words_kernel(out_ptr, x_ptr, OFFSET: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    words = (x_ptr + OFFSET).to(tl.pointer_type(tl.int32))
    tl.store(out_ptr + i, tl.load(words + i))


def test_a_misaligned_access() -> None:
    x, out = torch.zeros(40, dtype=torch.uint8), torch.empty(8, dtype=torch.int32)
    with checks():
        words_kernel[(1,)](out, x, OFFSET=4, BLOCK=8)
    with pytest.raises(CheckError, match=r"^misaligned load of 4 B in x_ptr: 8 of 8 lanes; program"), checks():
        words_kernel[(1,)](out, x, OFFSET=2, BLOCK=8)


@triton.jit
def offset_kernel(out_ptr, x_ptr, row, stride, WIDE: tl.constexpr, SANITIZE: tl.constexpr):
    if WIDE:
        row = row.to(tl.int64)
    offset = row * stride if SANITIZE else tl.mul(row, stride, sanitize_overflow=False)
    tl.store(out_ptr, offset.to(tl.int64))


@triton.jit
def step_kernel(x_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    x, i = tl.load(x_ptr), tl.arange(0, BLOCK).to(x_ptr.dtype.element_ty)
    if OP == "add":
        x += i
    else:
        x -= i


class TestOverflow:
    def run(self, row: int, wide: bool = False, sanitize: bool = True, **options) -> int:
        out = torch.empty(1, dtype=torch.int64)
        with checks(**options):
            offset_kernel[(1,)](out, out, row, 1 << 16, WIDE=wide, SANITIZE=sanitize)
        return out.item()

    def test_of_an_offset(self) -> None:
        assert self.run((1 << 15) - 1) == ((1 << 15) - 1) << 16
        message = (
            rf"^int32 overflow in mul: 1 of 1 lanes, the first is 2147483648; .*{line(offset_kernel, 'row * stride')}"
        )
        with pytest.raises(CheckError, match=message):
            self.run(1 << 15)
        with pytest.raises(CheckError, match=r"the first is -2147549184"):
            self.run(-(1 << 15) - 1)

    @pytest.mark.parametrize(
        ("op", "dtype", "last", "message"),
        [
            ("add", torch.int32, (1 << 31) - 4, r"^int32 overflow in add: 1 of 4 lanes, the first is 2147483648; "),
            ("sub", torch.uint8, 3, r"^uint8 overflow in sub: 1 of 4 lanes, the first is -1; "),
        ],
    )
    def test_of_a_sum_and_a_difference(self, op: str, dtype: torch.dtype, last: int, message: str) -> None:
        with checks():
            step_kernel[(1,)](torch.tensor([last], dtype=dtype), OP=op, BLOCK=4)
        beyond = last + (1 if op == "add" else -1)
        with pytest.raises(CheckError, match=message), checks():
            step_kernel[(1,)](torch.tensor([beyond], dtype=dtype), OP=op, BLOCK=4)

    def test_in_64_bits_there_is_none(self) -> None:
        assert self.run(1 << 15, wide=True) == 1 << 31

    def test_it_may_be_meant(self) -> None:
        assert self.run(1 << 15, sanitize=False) == -(1 << 31)
        assert self.run(1 << 15, overflow=False) == -(1 << 31)


@triton.jit
def assert_kernel(x_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.device_assert(tl.load(x_ptr + i) > 0, "x must be positive", mask=i < 6)


def test_device_assert() -> None:
    x = torch.ones(8)
    x[7] = -1
    with checks():
        assert_kernel[(1,)](x, BLOCK=8)
    x[1:3] = -1
    with (
        pytest.raises(CheckError, match=r"^device_assert: x must be positive: 2 of 8 lanes; program \(0, 0, 0\)"),
        checks(),
    ):
        assert_kernel[(1,)](x, BLOCK=8)


def test_memory_beyond_2_to_31_elements() -> None:
    """A pool of 5 GiB, allocated as it is touched: int64 offsets reach its end, int32 ones are found."""
    pool = torch.UntypedStorage(5 << 30)
    pool = torch.empty(0, dtype=torch.bfloat16).set_(pool).view(-1, 1 << 16)
    row = pool.shape[0] - 1
    with checks():
        row_kernel[(1,)](pool, row, WIDE=True, WIDTH=1 << 16, BLOCK=8)
    assert pool[row, :8].tolist() == [1.0] * 8
    with pytest.raises(CheckError, match=r"^int32 overflow in mul"), checks():
        row_kernel[(1,)](pool, row, WIDE=False, WIDTH=1 << 16, BLOCK=8)
    with pytest.raises(CheckError, match=r"^store out of bounds of pool_ptr"), checks(overflow=False):
        row_kernel[(1,)](pool, row, WIDE=False, WIDTH=1 << 16, BLOCK=8)


@triton.jit
def row_kernel(pool_ptr, row, WIDE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    if WIDE:
        row = row.to(tl.int64)
    tl.store(pool_ptr + row * WIDTH + tl.arange(0, BLOCK), tl.full([BLOCK], 1.0, tl.bfloat16))


def test_other_errors_pass_through() -> None:
    with pytest.raises(interpreter.InterpreterError, match="ZeroDivisionError"), checks():
        broken_kernel[(1,)](torch.empty(1))


@triton.jit
def broken_kernel(out_ptr):
    tl.store(out_ptr, 1 // 0)


def test_nothing_is_checked_after_the_block() -> None:
    before = (interpreter._interpreter, interpreter.GridExecutor, interpreter._implicit_cvt)
    with checks() as report:
        pass
    copy(torch.empty(8), torch.randn(8), 8)
    assert report.launches == []
    assert (interpreter._interpreter, interpreter.GridExecutor, interpreter._implicit_cvt) == before


# One program owns one row.
@triton.jit
def mean_kernel(out_ptr, x_ptr, n, TWICE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x_ptrs = x_ptr + tl.program_id(0) * n + i
    x = tl.load(x_ptrs, mask=i < n, other=0.0)
    mean = tl.sum(x, 0) / n
    if TWICE:
        x = tl.load(x_ptrs, mask=i < n, other=0.0)
    tl.store(out_ptr + tl.program_id(0) * n + i, x - mean, mask=i < n)


@pytest.mark.parametrize("twice", [False, True])
def test_a_second_pass_over_memory_is_counted(twice: bool) -> None:
    x = torch.randn(3, 100)
    with checks() as report:
        mean_kernel[(3,)](torch.empty_like(x), x, 100, TWICE=twice, BLOCK=128)
    assert (report.bytes_loaded, report.bytes_stored) == (x.nbytes * (1 + twice), x.nbytes)


def test_a_forgotten_store_is_poison() -> None:
    """Not a check of accesses: fresh memory holds NaN in these tests (tests/conftest.py)."""
    out = torch.empty(20)
    with checks():
        copy(out, torch.randn(20), 16)
    assert out[16:].isnan().all()
    assert not out[:16].isnan().any()


def test_messages_name_a_line_of_the_kernel() -> None:
    with pytest.raises(CheckError) as caught, checks():
        copy(torch.empty(20), torch.randn(10), 20)
    assert re.search(r"of copy_kernel, test_checks\.py:\d+$", str(caught.value))
