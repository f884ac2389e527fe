"""matmul_int8 in Triton, where it differs from matmul_int4: split-K, batch invariance, and the bytes that it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch

from fastllama import kernels
from fastllama.kernels.dispatch.op import OPS
from fastllama.kernels.launch import device, heuristics, tuning
from fastllama.kernels.triton.matmul.epilogue import COUNTERS
from fastllama.testing.monitor import CheckedRun
from fastllama.testing.poison import noise_, surrounded
from tests.kernels.honest import assert_equal
from tests.kernels.ops.test_int8 import ASSEMBLY, Weight, check
from tests.kernels.triton.matmul.test_int4 import elements_of_all

pytestmark = pytest.mark.interpreter


@pytest.fixture
def launch() -> Iterator[Callable[[int], None]]:
    """`launch(splits)`: how many there are, from now on."""
    with mock.patch.object(tuning, "int8") as asked:

        def choose(splits: int) -> None:
            asked.return_value = heuristics.QuantizedMatmulLaunch(splits, 2, 4)

        yield choose


@pytest.fixture
def _bound(bind: Callable[..., None]) -> None:
    bind("matmul_int8", OPS["matmul_int8"].launcher("cpu"))


@pytest.mark.parametrize("splits", [1, 2, 3, 8])
@pytest.mark.parametrize(("size", "group"), [(640, 128), (608, 32), (400, 400), (576, 64)])
def test_splits(launch: Callable[[int], None], checked: CheckedRun, size: int, group: int, splits: int) -> None:
    """Of five tiles, the last not whole: as many programs as there are splits, none of them empty."""
    launch(splits)
    check(ASSEMBLY, torch.randn(3, size).half(), Weight.of(130, size, group, torch.float16), torch.randn(130).half())
    tiles = -(-size // 128)
    per_split = -(-tiles // splits)
    (launched,) = checked.launches
    assert launched.grid == (2, -(-tiles // per_split), 1)


@pytest.mark.in_turn("splits")
@pytest.mark.usefixtures("_bound")
@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("splits", [1, 3])
def test_a_row_is_the_same_whatever_the_others(
    launch: Callable[[int], None], splits: int, dtype: torch.dtype, arch: str
) -> None:
    """Bit for bit, in any place, among as many rows as the kernel multiplies by packed values."""
    launch(splits)
    most = 16 if dtype == torch.float32 else 64
    weight, x = Weight.of(70, 608, 32, dtype), torch.randn(most, 608).to(dtype)
    with mock.patch.object(device, "device_info", return_value=replace(device.CPU, arch=arch)):
        whole = kernels.matmul_int8(x, *weight.packed)
        for rows in (1, 3, 15, 16, 17, 33, 63):
            if rows < most:
                for some in (slice(0, rows), slice(most - rows, most)):
                    assert_equal(kernels.matmul_int8(x[some], *weight.packed), whole[some])


@pytest.mark.usefixtures("_bound")
@pytest.mark.parametrize("rows", [5, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_workspace_is_as_of_4_bits(
    launch: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int
) -> None:
    launch(4)
    monkeypatch.setattr(OPS["matmul_int8"], "implementation", lambda kind: mock.Mock(backend="triton"))
    weight, x = Weight.of(67, 390, 390, dtype), torch.randn(rows, 390).to(dtype)
    workspace = kernels.matmul_int8_workspace(x, *weight.packed)
    assert workspace.shape == (elements_of_all(rows, dtype.itemsize),)
    expected = kernels.matmul_int8(x, *weight.packed)
    noise_(workspace)[:COUNTERS] = 0
    with surrounded(workspace) as inside:
        for _ in range(2):
            assert_equal(kernels.matmul_int8(x, *weight.packed, workspace=inside), expected)


@pytest.mark.usefixtures("_bound")
@pytest.mark.parametrize("rows", [1, 16, 17, 64])
def test_the_weight_is_read_once(launch: Callable[[int], None], checked: CheckedRun, rows: int) -> None:
    """A byte each, and 2 for each scale; x for every 128 features."""
    launch(2)
    weight = Weight.of(256, 512, 128, torch.bfloat16)
    kernels.matmul_int8(torch.randn(rows, 512).bfloat16(), *weight.packed)
    (launched,) = checked.launches
    parts = {"parts_ptr": 2 * rows * 256 * 4}
    read = {"x_ptr": 2 * rows * 512 * 2, "packed_ptr": 256 * 512, "scales_ptr": 256 * 4 * 2}
    assert launched.loaded == read | parts
    assert launched.stored == {"out_ptr": rows * 256 * 2} | parts


@pytest.mark.usefixtures("_bound")
def test_the_weight_of_many_rows_is_written_once(checked: CheckedRun) -> None:
    weight = Weight.of(70, 192, 64, torch.bfloat16)
    kernels.matmul_int8(torch.randn(65, 192).bfloat16(), *weight.packed)
    (launched,) = checked.launches
    assert launched.loaded == {"packed_ptr": 128 * 192, "scales_ptr": 128 * 3 * 2}
    assert launched.stored == {"weight_ptr": 70 * 192 * 2}


@pytest.mark.usefixtures("_bound")
@pytest.mark.parametrize("rows", [2, 70])
def test_words_that_are_not_whole_are_refused_before_anything_is_written(rows: int) -> None:
    packed, scales = Weight.of(70, 64, 64, torch.float16).packed
    x, out = torch.randn(rows, 64).half(), torch.zeros(rows, 70).half()
    moved = torch.empty(packed.numel() + 4, dtype=torch.int8)[2:-2].view(packed.shape).copy_(packed)
    apart = torch.empty(2 * packed[0].numel() + 2, dtype=torch.int8)
    spread = apart.as_strided(packed.shape, (packed[0].numel() + 2, *packed.stride()[1:])).copy_(packed)
    for wrong, seen in ((moved, "stride 8192 and storage offset 2"), (spread, "stride 8194 and storage offset 0")):
        with pytest.raises(ValueError, match=f"^packed has {seen}; legal: multiples of 4$"):
            kernels.matmul_int8(x, wrong, scales, out=out)
    assert (out == 0).all()


@pytest.mark.usefixtures("_bound")
@pytest.mark.parametrize("rows", [2, 70])
def test_rows_past_two_to_the_31_words(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the weight: the third row of tiles."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # it takes memory
    packed, scales = Weight.of(129, 64, 32, torch.float16).packed
    x = torch.randn(rows, 64).half()
    expected = kernels.matmul_int8(x, packed, scales)
    apart = (1 << 32) + 64
    buffer = torch.empty(2 * apart + packed[0].numel(), dtype=torch.int8)
    far = buffer.as_strided(packed.shape, (apart, *packed[0].stride())).copy_(packed)
    assert_equal(kernels.matmul_int8(x, far, scales), expected)
