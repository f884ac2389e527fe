"""matmul_int4 in Triton: split-K, batch invariance, scratch memory, and the bytes that it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fastllama import kernels
from fastllama.kernels.dispatch.op import OPS
from fastllama.kernels.launch import heuristics, tuning
from fastllama.kernels.triton.matmul.epilogue import COUNTERS
from fastllama.testing.monitor import CheckedRun
from fastllama.testing.poison import noise_, surrounded
from tests.kernels.honest import assert_equal
from tests.kernels.ops.test_int4 import Weight, check

pytestmark = pytest.mark.interpreter
SPLITS = [1, 2, 3, 8]


@pytest.fixture
def launch() -> Iterator[Callable[[int], None]]:
    """`launch(splits)`: how many there are, from now on."""
    with mock.patch.object(tuning, "int4") as asked:

        def choose(splits: int) -> None:
            asked.return_value = heuristics.QuantizedMatmulLaunch(splits, 2, 4)

        yield choose


@pytest.fixture
def _bound(bind: Callable[..., None]) -> None:
    bind("matmul_int4", OPS["matmul_int4"].launcher("cpu"))


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize(
    ("size", "group", "zeros"), [(640, 128, None), (608, 32, torch.uint8), (400, 400, torch.float16), (576, 64, None)]
)
def test_splits(
    launch: Callable[[int], None], checked: CheckedRun, size: int, group: int, zeros: torch.dtype | None, splits: int
) -> None:
    """Of five tiles, the last not whole: as many programs as there are splits, none of them empty."""
    launch(splits)
    weight = Weight.of(70, size, group, torch.float16, zeros)
    check("triton", torch.randn(3, size).half(), weight, torch.randn(70).half())
    tiles = -(-size // 128)
    per_split = -(-tiles // splits)
    (launched,) = checked.launches
    assert launched.grid == (2, -(-tiles // per_split), 1)


@pytest.mark.in_turn("splits", "zeros")
@pytest.mark.usefixtures("_bound")
@pytest.mark.parametrize("zeros", [None, torch.uint8], ids=["symmetric", "zeros"])
@pytest.mark.parametrize("splits", [1, 3])
def test_a_row_is_the_same_whatever_the_others(launch: Callable[[int], None], splits: int, zeros: Any) -> None:
    """Bit for bit, in any place, among 1 to 64 rows."""
    launch(splits)
    weight, x = Weight.of(70, 608, 32, torch.bfloat16, zeros), torch.randn(64, 608).bfloat16()
    whole = kernels.matmul_int4(x, *weight.packed)
    for rows in (1, 2, 3, 15, 16, 17, 31, 32, 33, 48, 63):
        for some in (slice(0, rows), slice(64 - rows, 64)):
            assert_equal(kernels.matmul_int4(x[some], *weight.packed), whole[some])


def elements(rows: int, itemsize: int) -> int:
    """Of a workspace for a weight [67, 390] and four splits: two tiles and one more, or the weight."""
    return COUNTERS + (4 * rows * 3 * (64 + 1) if rows <= 64 else -(-67 * 390 * itemsize // 4))


def elements_of_all(rows: int, itemsize: int) -> int:
    """Elements of a workspace that serves fewer rows, too."""
    return max(elements(few, itemsize) for few in (min(rows, 16 if itemsize == 4 else 64), rows))


@pytest.mark.usefixtures("_bound")
@pytest.mark.parametrize("rows", [5, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_workspace_holds_anything_but_counts_and_is_all_that_is_used(
    launch: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int
) -> None:
    launch(4)
    monkeypatch.setattr(OPS["matmul_int4"], "implementation", lambda kind: mock.Mock(backend="triton"))
    weight, x = Weight.of(67, 390, 390, dtype), torch.randn(rows, 390).to(dtype)
    packed, scales, _ = weight.packed
    workspace = kernels.matmul_int4_workspace(x, packed, scales)
    assert workspace.shape == (elements_of_all(rows, dtype.itemsize),)
    expected = kernels.matmul_int4(x, packed, scales)
    noise_(workspace)[:COUNTERS] = 0
    with surrounded(workspace) as inside:
        for _ in range(2):  # the counts are zero again
            assert_equal(kernels.matmul_int4(x, packed, scales, workspace=inside), expected)


@pytest.mark.usefixtures("_bound")
@pytest.mark.parametrize("rows", [5, 70])
def test_a_workspace_that_is_too_small_is_refused_before_anything_is_written(
    launch: Callable[[int], None], rows: int
) -> None:
    launch(4)
    weight, x, out = Weight.of(67, 390, 390, torch.float16), torch.randn(rows, 390).half(), torch.zeros(rows, 67).half()
    given, size = (x, *weight.packed), elements(rows, 2)
    with pytest.raises(
        ValueError, match=f"^workspace has {size - 1} elements; legal for these tensors: at least {size}$"
    ):
        kernels.matmul_int4(*given, out=out, workspace=torch.zeros(size - 1))
    assert (out == 0).all()
    kernels.matmul_int4(*given, out=out, workspace=torch.zeros(size))


@pytest.mark.usefixtures("_bound")
@pytest.mark.parametrize("rows", [1, 16, 17, 64])
def test_the_weight_is_read_once(launch: Callable[[int], None], checked: CheckedRun, rows: int) -> None:
    """Half a byte each, and 2 for each scale and zero; x for every 64 features, from 17 rows on for every 128."""
    launch(2)
    weight = Weight.of(128, 512, 128, torch.bfloat16, torch.bfloat16)
    kernels.matmul_int4(torch.randn(rows, 512).bfloat16(), *weight.packed)
    (launched,) = checked.launches
    assert launched.loaded == {
        "x_ptr": (2 if rows <= 16 else 1) * rows * 512 * 2,
        "packed_ptr": 128 * 512 // 2,
        "scales_ptr": 128 * 4 * 2,
        "zeros_ptr": 128 * 4 * 2,
        "parts_ptr": 2 * rows * 128 * 4,
    }
    assert launched.stored == {"parts_ptr": 2 * rows * 128 * 4, "out_ptr": rows * 128 * 2}


@pytest.mark.usefixtures("_bound")
def test_the_weight_of_many_rows_is_written_once(checked: CheckedRun) -> None:
    weight = Weight.of(70, 192, 64, torch.bfloat16)
    kernels.matmul_int4(torch.randn(65, 192).bfloat16(), *weight.packed)
    (launched,) = checked.launches
    assert launched.loaded == {"packed_ptr": 128 * 192 // 2, "scales_ptr": 128 * 3 * 2}  # past the last row, its own
    assert launched.stored == {"weight_ptr": 70 * 192 * 2}


@pytest.mark.usefixtures("_bound")
@pytest.mark.parametrize("rows", [2, 70])
@pytest.mark.parametrize("name", ["packed", "scales", "zeros"])
def test_rows_past_two_to_the_31_elements(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the weight: the third row of tiles, and the rows of scales and zeros that go with it."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # it takes memory
    packed, scales, zeros = Weight.of(129, 64, 32, torch.float16, torch.uint8).packed
    given = {"packed": packed, "scales": scales, "zeros": zeros}
    x = torch.randn(rows, 64).half()
    expected = kernels.matmul_int4(x, **given)
    value = given[name]
    assert isinstance(value, Tensor)
    apart = (1 << 31) // (value.shape[0] - 1) // 16 * 16 + 16
    inner = value[0]
    buffer = torch.empty(apart * (value.shape[0] - 1) + inner.numel(), dtype=value.dtype)
    far = buffer.as_strided(value.shape, (apart, *inner.stride())).copy_(value)
    assert_equal(kernels.matmul_int4(x, **given | {name: far}), expected)
