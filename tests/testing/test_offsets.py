"""32-bit offsets: each kind of overflow is found in a small kernel, and none in a correct one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from fastllama.testing.offsets import LIMITS, Narrow, narrow_offsets
from fastllama.testing.recorder import record
from fastllama.testing.targets import TARGETS
from fastllama.testing.triton_ir import triton_ir
from tests.testing.toys import empty

pytestmark = pytest.mark.compile
FAR = (1 << 30) + 64


@triton.jit
def product_of_arguments_kernel(x_ptr, row_stride):
    tl.store(x_ptr + tl.program_id(0) * row_stride, 0.0)


@triton.jit
def product_with_a_constant_kernel(x_ptr, FAR: tl.constexpr):
    tl.store(x_ptr + tl.program_id(1) * FAR, 0.0)


@triton.jit
def product_of_rows_kernel(x_ptr, SIZE: tl.constexpr):
    tl.store(x_ptr + tl.program_id(0) * SIZE + tl.arange(0, 16), 0.0)


@triton.jit
def product_of_loaded_kernel(x_ptr, ids_ptr):
    tl.store(x_ptr + tl.load(ids_ptr) * 4, 0.0)


@triton.jit
def shift_kernel(x_ptr, n):
    tl.store(x_ptr + (n << 4), 0.0)


@triton.jit
def sum_kernel(x_ptr, FAR: tl.constexpr):
    head = tl.arange(0, 2)[:, None]
    tl.store(x_ptr + head * FAR + (tl.program_id(1) % 2 * FAR + tl.arange(0, 16))[None, :], 0.0)
    tl.store(x_ptr + (head * FAR + tl.program_id(1) % 2 * FAR), 0.0)


@triton.jit
def widened_too_late_kernel(x_ptr, row_stride):
    tl.store(x_ptr + (tl.program_id(0) * row_stride).to(tl.int64), 0.0)


@triton.jit
def through_a_minimum_kernel(x_ptr, FAR: tl.constexpr):
    tl.store(x_ptr + tl.maximum(tl.minimum(tl.program_id(1) * FAR, 1000) % 64, 0), 0.0)


@triton.jit
def carried_by_a_loop_kernel(x_ptr, n, FAR: tl.constexpr):
    offset = tl.program_id(1)
    for _ in range(n):
        tl.store(x_ptr + offset, 0.0)
        offset = offset % 8 * FAR


@triton.jit
def carried_by_a_while_kernel(x_ptr, n, FAR: tl.constexpr):
    offset, turn = tl.program_id(1) % 8, n
    while turn > 0:
        turn -= 1
        offset = (offset * FAR) % 8
    tl.store(x_ptr + offset, 0.0)


@triton.jit
def chosen_by_a_branch_kernel(x_ptr, n, FAR: tl.constexpr):
    offset = 0
    if n > 3:
        offset = tl.program_id(1) * FAR
    tl.store(x_ptr + offset, 0.0)


@triton.jit
def selected_kernel(x_ptr, n, FAR: tl.constexpr):
    tl.store(x_ptr + tl.where(n > 3, 0, tl.program_id(1) * FAR), 0.0)


@triton.jit
def times(a, b):
    return a * b


@triton.jit
def in_a_helper_kernel(x_ptr, FAR: tl.constexpr):
    tl.store(x_ptr + times(tl.program_id(1), FAR), 0.0)


@triton.jit
def reduced_kernel(x_ptr, FAR: tl.constexpr):
    tl.store(x_ptr + tl.max(tl.arange(0, 16) * FAR, 0), 0.0)


@triton.jit
def behind_a_return_kernel(x_ptr, n, FAR: tl.constexpr):
    if n == 7:
        return
    tl.store(x_ptr + tl.program_id(1) * FAR, 0.0)


@triton.jit
def right_kernel(x_ptr, ids_ptr, row_stride, n, FAR: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # bounded by the grid
    tl.store(x_ptr + row * row_stride + head * FAR + col, 0.0)
    tl.store(x_ptr + row * SIZE + tl.program_id(0) % 4 * BLOCK, 0.0)  # by a remainder
    tl.store(x_ptr + tl.minimum(n, 1000) * 1000 + n // 8 * 8, 0.0)  # by a minimum, by a quotient
    tl.store(x_ptr + tl.load(ids_ptr).to(tl.int64) * row_stride, 0.0)
    for start in range(0, n, BLOCK):
        tl.store(x_ptr + start + tl.arange(0, BLOCK), 0.0)  # a column: of fewer than 2^31
    for start in range(0, SIZE, BLOCK):
        tl.store(x_ptr + start * 32, 0.0)  # by the end of a loop
    found = tl.sum((col > 3).to(tl.int32), 0)
    tl.store(x_ptr + tl.minimum(found, 7) * FAR // 16, 0.0, mask=found * FAR > n)  # a mask is no offset
    if n > 100:
        tl.store(x_ptr + (n & 15) * 64 + (col >> 3), 0.0)
    tl.store(x_ptr + tl.max(col, 0), 0.0)


def found_in(kernel: Any, grid: tuple[int, ...] = LIMITS, **arguments: Any) -> list[Narrow]:
    with record(TARGETS["sm_90"]) as launches:
        kernel[(1,)](x_ptr=empty(4), **arguments)
    (launch,) = launches
    return narrow_offsets(triton_ir(launch), grid)


WRONG: dict[Callable[..., Any], tuple[dict[str, Any], str]] = {
    product_of_arguments_kernel: ({"row_stride": 48}, "product"),
    product_with_a_constant_kernel: ({"FAR": FAR}, "product"),
    product_of_rows_kernel: ({"SIZE": 17}, "product"),
    product_of_loaded_kernel: ({"ids_ptr": None}, "product"),
    shift_kernel: ({"n": 48}, "shift"),
    widened_too_late_kernel: ({"row_stride": 48}, "product"),
    through_a_minimum_kernel: ({"FAR": FAR}, "product"),
    carried_by_a_loop_kernel: ({"n": 48, "FAR": FAR}, "product"),
    carried_by_a_while_kernel: ({"n": 48, "FAR": FAR}, "product"),
    chosen_by_a_branch_kernel: ({"n": 48, "FAR": FAR}, "product"),
    selected_kernel: ({"n": 48, "FAR": FAR}, "product"),
    in_a_helper_kernel: ({"FAR": FAR}, "product"),
    reduced_kernel: ({"FAR": FAR}, "product"),
    behind_a_return_kernel: ({"n": 48, "FAR": FAR}, "product"),
}


@pytest.mark.parametrize("kernel", WRONG, ids=lambda kernel: kernel.__name__)
def test_each_way_to_an_offset_is_followed(kernel: Any) -> None:
    arguments, operation = WRONG[kernel]
    given = {name: empty(4, dtype=torch.int32) if value is None else value for name, value in arguments.items()}
    found = found_in(kernel, **given)
    assert [each.operation for each in found] == [operation]
    assert found[0].kernel == kernel.__name__
    assert found[0].line.startswith("test_offsets.py:")
    assert any(sign in found[0].code for sign in ("*", "<<"))


def test_a_sum_of_products_that_fit_may_not() -> None:
    found = found_in(sum_kernel, FAR=FAR)
    assert [each.operation for each in found] == ["sum"]
    assert found[0].range == (0, 2 * FAR)


def test_what_is_bounded_is_not_reported() -> None:
    ids = empty(4, dtype=torch.int32)
    assert found_in(right_kernel, ids_ptr=ids, row_stride=48, n=48, FAR=FAR // 8, SIZE=1 << 17, BLOCK=64) == []


def test_the_grid_bounds_programs() -> None:
    assert found_in(product_with_a_constant_kernel, (1, 2), FAR=FAR) == []
    assert found_in(product_with_a_constant_kernel, (1, 3), FAR=FAR) != []


def test_a_report_names_the_place_and_the_numbers() -> None:
    (found,) = found_in(product_with_a_constant_kernel, (1, 3), FAR=FAR)
    assert str(found) == (
        f"product_with_a_constant_kernel, {found.line}: a product of program_id(1) (0 to 2) and {FAR} is 0 to "
        f"{2 * FAR}, in 32 bits: tl.store(x_ptr + tl.program_id(1) * FAR, 0.0)"
    )
