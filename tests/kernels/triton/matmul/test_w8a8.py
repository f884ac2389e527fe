"""matmul_w8a8 in Triton: split-K, tiles in any order, scratch memory, and the bytes that it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch

from fastllama import kernels
from fastllama.kernels.dispatch.op import OPS
from fastllama.kernels.launch import heuristics, tuning
from fastllama.testing.monitor import CheckedRun
from fastllama.testing.poison import noise_, surrounded
from tests.kernels.honest import assert_equal
from tests.kernels.ops.test_w8a8 import check, drawn

pytestmark = pytest.mark.interpreter
Choose = Callable[..., None]


@pytest.fixture
def launch() -> Iterator[Choose]:
    """`launch(rows, columns, splits)`: the launch from now on."""
    with mock.patch.object(tuning, "w8a8") as asked:

        def choose(rows: int = 16, columns: int = 128, splits: int = 1) -> None:
            asked.return_value = heuristics.W8A8Launch(rows, columns, splits, 2, 4)

        yield choose


@pytest.fixture
def _bound(bind: Callable[..., None]) -> None:
    for op in ("matmul_w8a8", "quantize_rows"):
        bind(op, OPS[op].launcher("cpu"))


@pytest.mark.parametrize("columns", [64, 128])
@pytest.mark.parametrize("splits", [1, 2, 3, 8])
def test_splits(launch: Choose, checked: CheckedRun, splits: int, columns: int) -> None:
    """Of five tiles, the last not whole: as many programs as there are splits, none of them empty."""
    launch(16, columns, splits)
    check("triton", *drawn(19, 130, 600, torch.float16), torch.randn(130).half())
    per_split = -(-5 // splits)
    assert [each.kernel for each in checked.launches] == ["matmul_w8a8_kernel", "matmul_w8a8_sum_kernel"][
        : 1 + (splits > 1)
    ]
    assert checked.launches[0].grid == (4, -(-5 // per_split), 1)


@pytest.mark.usefixtures("_bound")
def test_launches_change_no_bit(launch: Choose) -> None:
    """Whatever the tiles and splits are, with a bias and without."""
    x, x_scales, codes, scales = drawn(70, 130, 600, torch.float32)
    packed = kernels.pack_int8(codes)
    for bias in (None, torch.randn(130)):
        launch()
        expected = kernels.matmul_w8a8(x, x_scales, packed, scales, bias)
        for rows, columns, splits in ((16, 64, 1), (64, 128, 3), (128, 64, 5)):
            launch(rows, columns, splits)
            assert_equal(kernels.matmul_w8a8(x, x_scales, packed, scales, bias), expected)


@pytest.mark.usefixtures("_bound")
def test_every_tile_has_a_program(launch: Choose) -> None:
    """With more tiles of rows than a group has, the last group not whole."""
    launch()
    check("triton", *drawn(16 * 19, 300, 64, torch.bfloat16), None)


@pytest.mark.usefixtures("_bound")
@pytest.mark.parametrize("splits", [1, 4])
def test_a_workspace_holds_anything_before_and_is_all_that_is_used(
    launch: Choose, monkeypatch: pytest.MonkeyPatch, splits: int
) -> None:
    launch(splits=splits)
    monkeypatch.setattr(OPS["matmul_w8a8"], "implementation", lambda kind: mock.Mock(backend="triton"))
    x, x_scales, codes, scales = drawn(5, 67, 500, torch.bfloat16)
    given = (x, x_scales, kernels.pack_int8(codes), scales)
    workspace = kernels.matmul_w8a8_workspace(x, given[2], scales)
    size = 4 * 5 * 67 if splits > 1 else 0
    assert (workspace.shape, workspace.dtype) == ((size,), torch.int32)
    expected = kernels.matmul_w8a8(*given)
    with surrounded(noise_(workspace.view(torch.float32)).view(torch.int32)) as inside:
        assert_equal(kernels.matmul_w8a8(*given, workspace=inside), expected)
    if size:
        out = torch.zeros(5, 67).bfloat16()
        with pytest.raises(ValueError, match=f"^workspace has {size - 1} elements; legal for these tensors: at least"):
            kernels.matmul_w8a8(*given, out=out, workspace=torch.empty(size - 1, dtype=torch.int32))
        assert (out == 0).all()


@pytest.mark.usefixtures("_bound")
@pytest.mark.parametrize("rows", [1, 16])
def test_the_weight_is_read_once(launch: Choose, checked: CheckedRun, rows: int) -> None:
    """A byte each; x for every 128 features."""
    launch(splits=2)
    x, x_scales, codes, scales = drawn(rows, 256, 512, torch.bfloat16)
    kernels.matmul_w8a8(x, x_scales, kernels.pack_int8(codes), scales)
    product, added = checked.launches
    if rows == 16:  # below, rows past the last are read as the last is
        assert product.loaded == {"x_ptr": 2 * rows * 512, "packed_ptr": 256 * 512}
    assert product.loaded["packed_ptr"] == 256 * 512
    assert product.stored == {"out_ptr": 2 * rows * 256 * 4}
    assert added.loaded == {"parts_ptr": 2 * rows * 256 * 4, "x_scales_ptr": rows * 4, "scales_ptr": rows * 256 * 2}
    assert added.stored == {"out_ptr": rows * 256 * 2}


@pytest.mark.usefixtures("_bound")
def test_rows_are_rounded_in_one_pass(checked: CheckedRun) -> None:
    kernels.quantize_rows(torch.randn(5, 300).bfloat16())
    (launched,) = checked.launches
    assert launched.loaded == {"x_ptr": 5 * 300 * 2}
    assert launched.stored == {"out_ptr": 5 * 300, "scales_out_ptr": 5 * 4}


@pytest.mark.usefixtures("_bound")
@pytest.mark.parametrize("name", ["x", "packed", "out"])
def test_rows_past_two_to_the_31_elements(launch: Choose, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # it takes memory
    launch()
    x, x_scales, codes, scales = drawn(3, 129, 64, torch.float16)
    given = {"x": x, "x_scales": x_scales, "packed": kernels.pack_int8(codes), "scales": scales}
    given["out"] = torch.empty(3, 129).half()
    expected = kernels.matmul_w8a8(**given).clone()
    value = given[name]
    apart = (1 << 31) // (value.shape[0] - 1) // 16 * 16 + 16
    inner = value[0]
    buffer = torch.empty(apart * (value.shape[0] - 1) + inner.numel(), dtype=value.dtype)
    far = buffer.as_strided(value.shape, (apart, *inner.stride())).copy_(value)
    assert_equal(kernels.matmul_w8a8(**given | {name: far}), expected)


@pytest.mark.usefixtures("_bound")
def test_rounded_rows_past_two_to_the_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    apart = (1 << 30) + 64
    x = torch.empty(2 * apart + 70, dtype=torch.float16).as_strided((3, 70), (apart, 1)).copy_(torch.randn(3, 70))
    for found, expected in zip(kernels.quantize_rows(x), kernels.quantize_rows(x.clone()), strict=True):
        assert_equal(found, expected)
