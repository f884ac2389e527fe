"""Prologue and epilogue of a Triton matmul: splits reduced by the last program to finish, and a norm's factor."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama import kernels
from fastllama.kernels import reference
from fastllama.kernels.dispatch.op import OPS
from fastllama.kernels.triton.matmul import dense as module
from fastllama.kernels.triton.matmul.epilogue import COUNTERS, splits_of
from fastllama.testing.checks import CheckError
from fastllama.testing.monitor import CheckedRun
from tests.kernels.honest import assert_equal, assert_honest, double, public
from tests.kernels.ops.test_fusion import FORMS, around, plain, weight_of
from tests.kernels.triton.matmul.test_dense import launching, matmul

BF16 = torch.bfloat16
interpreter = pytest.mark.interpreter


def case(rows: int, size: int, features: int, form: str) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    x = torch.randn(rows, size).to(BF16)
    return (x, (torch.randn(features, size) / math.sqrt(size)).to(BF16)), around(form, x, features)


@pytest.mark.parametrize("form", ["", "norm, residual", "norm, gated"])
@pytest.mark.parametrize(
    "order", [pytest.param(order, marks=interpreter(order=order)) for order in ("forward", "reverse", "shuffle")]
)
def test_whichever_program_comes_last(monkeypatch: pytest.MonkeyPatch, order: str, form: str) -> None:
    """The splits are reduced in one order, and the counts are zero again."""
    launching(monkeypatch, splits=4)
    x, weight = torch.ones(19, 128).to(BF16), torch.zeros(40, 128).to(BF16)
    weight[:, ::32] = torch.tensor([2.0**24, 1, 1, -(2.0**24)])  # in this order alone 0, as a 1 is lost in 2^24
    options = around(form, x, 40)
    if "norm" in form:
        options["norm"] = torch.ones(128)
    workspace = torch.zeros(module.workspace_size(19, weight))
    workspace[COUNTERS:] = math.nan
    expected = reference.matmul(x, torch.zeros_like(weight), **options)
    assert_equal(matmul(x, weight, **options, workspace=workspace), expected)
    assert_equal(workspace[:COUNTERS], torch.zeros(COUNTERS))


@interpreter
@pytest.mark.parametrize("form", FORMS)
def test_any_form_in_splits(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Each split sums the squares of its columns, for rows that differ by 10^4 in magnitude."""
    launching(monkeypatch, splits=4)
    x = (torch.randn(19, 300) * torch.logspace(-2, 2, 19)[:, None]).to(BF16)
    weight, bias = (torch.randn(44, 300) / 20).to(BF16), torch.randn(44).to(BF16)
    options = around(form, x, 44)
    exact = dict(zip(options, double(*options.values()), strict=True))
    found = matmul(x, weight, bias, **options)
    assert_honest(found, plain(x, weight, bias, **options), reference.matmul(*double(x, weight, bias), **exact))


@interpreter
def test_a_program_that_does_not_wait_for_the_others_is_a_race(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a count was not zero at the start."""
    launching(monkeypatch, splits=4)
    given, _ = case(3, 256, 20, "")
    workspace = torch.zeros(module.workspace_size(3, given[1]))
    workspace[:COUNTERS].view(torch.int32)[:] = 2
    with pytest.raises(
        CheckError, match=r"^race in matmul_dense_kernel: one program reads what another writes, parts_ptr"
    ):
        matmul(*given, workspace=workspace)


@interpreter
@pytest.mark.parametrize("op", ["matmul", "matmul_int4"])
@pytest.mark.parametrize("gated", [False, True])
def test_the_factor_of_a_row_is_the_same_in_any_batch(monkeypatch: pytest.MonkeyPatch, op: str, gated: bool) -> None:
    """Bit for bit, in any place. Each feature is one column of x, so that only the sum of squares can differ."""
    launching(monkeypatch, splits=2, size=32)
    x, norm = torch.randn(64, 192).to(BF16), torch.rand(192)
    codes = torch.full((128, 192), 8, dtype=torch.uint8)
    codes[range(128), torch.randperm(192)[:128]] = 9
    weight = (codes.to(BF16) - 8,) if op == "matmul" else (kernels.pack_int4(codes), torch.ones(128, 1))
    run = public(op, "triton")
    together = run(x, *weight, norm=norm, gated=gated)
    for rows in (1, 15, 16, 17, 33, 63):
        for some in (slice(0, rows), slice(64 - rows, 64)):
            assert_equal(run(x[some], *weight, norm=norm, gated=gated), together[some])


@interpreter
def test_all_of_it_is_one_launch(monkeypatch: pytest.MonkeyPatch, checked: CheckedRun) -> None:
    """It reads x, the weight and the rest once, whatever the number of splits, besides their partial sums."""
    for splits in (1, 4):
        launching(monkeypatch, splits=splits, features=32)
        given, options = case(5, 256, 64, "norm, gated")
        checked.launches.clear()
        matmul(*given, **options)
        (launch,) = checked.launches
        assert launch.loaded["weight_ptr"] == 64 * 256 * 2
        assert launch.loaded["x_ptr"] == 2 * 16 * 256 * 2  # by two tiles, and as a whole tile of rows
        assert launch.loaded["norm_ptr"] == 2 * 256 * 2
        assert launch.stored["out_ptr"] == 5 * 32 * 2
        parts = (splits > 1) * splits * 5 * 64 * 4
        assert launch.stored["parts_ptr"] == launch.loaded["parts_ptr"] == parts


@interpreter
def test_what_a_kernel_does_not_take_is_an_op_of_its_own(monkeypatch: pytest.MonkeyPatch, checked: CheckedRun) -> None:
    """A norm in fp16 or fp32; silu * up of halves that are not whole tiles of 4-bit weights."""
    launching(monkeypatch)
    (x, weight), options = case(2, 64, 24, "norm")
    for dtype in (torch.float16, torch.float32):
        checked.launches.clear()
        matmul(x.to(dtype), weight.to(dtype), norm=options["norm"].to(dtype))
        (launch,) = checked.launches
        assert not launch.loaded["norm_ptr"]
    for features, columns in ((192, 192), (256, 128)):
        given, _ = weight_of("matmul_int4", features, 64)
        checked.launches.clear()
        public("matmul_int4", "triton")(x, given[0], given[1].to(BF16), norm=options["norm"], gated=True)
        (launch,) = checked.launches
        assert launch.loaded["norm_ptr"]
        assert launch.stored["out_ptr"] == 2 * columns * 2


def test_no_split_is_empty_and_all_columns_are_in_one() -> None:
    for blocks in range(1, 40):
        for wanted in (1, 2, 3, 4, 8, 16):
            found = splits_of(3, blocks * 32 - 5, 32, tiles=7, width=64, wanted=wanted)
            assert found.columns % 32 == 0
            assert found.count <= wanted
            assert (found.count - 1) * found.columns < blocks * 32 - 5 <= found.count * found.columns
            assert found.elements == (COUNTERS + found.count * 3 * 7 * 65 if found.count > 1 else 0)


def test_more_tiles_than_counts_are_not_split() -> None:
    assert splits_of(1, 1024, 32, tiles=COUNTERS, width=16, wanted=4).count == 4
    assert splits_of(1, 1024, 32, tiles=COUNTERS + 1, width=16, wanted=4).count == 1


def test_every_op_that_counts_has_a_workspace() -> None:
    assert all("workspace" in op.names for op in OPS.values() if op.has_triton and "gated" in op.names)
