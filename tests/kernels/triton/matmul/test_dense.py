"""What only the Triton matmul has: split-K, tiles that the rows do not fill, and torch's matmul for more rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama import kernels
from fastllama.kernels import reference
from fastllama.kernels.launch import heuristics, tuning
from fastllama.kernels.launch.device import Device
from fastllama.kernels.triton.matmul import dense as module
from fastllama.kernels.triton.matmul.dense import MOST_ROWS, workspace_size
from fastllama.kernels.triton.matmul.epilogue import COUNTERS
from tests.kernels.honest import assert_equal, assert_honest, double, public
from tests.kernels.ops.test_matmul import inputs

BF16 = torch.bfloat16
H200 = Device("nvidia-h200", "sm_90", 132, 32, 232448, 62914560)


def matmul(*args: Any, **options: Any) -> Tensor:
    found: Tensor = public("matmul", "triton")(*args, **options)
    return found


def launching(monkeypatch: pytest.MonkeyPatch, **values: int) -> None:
    """One launch for every shape."""
    launch = heuristics.MatmulLaunch(
        **({"features": 16, "size": 32, "splits": 1, "stages": 2, "num_warps": 1} | values)
    )
    monkeypatch.setattr(tuning, "matmul", lambda device, **shape: launch)


@pytest.mark.interpreter
@pytest.mark.parametrize("splits", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [1, 31, 32, 33, 64, 100, 255, 256, 257])
def test_columns_in_any_number_of_splits(monkeypatch: pytest.MonkeyPatch, size: int, splits: int) -> None:
    """Of whole tiles, of a last tile that is not whole, and of fewer tiles than splits."""
    launching(monkeypatch, splits=splits)
    x, weight, bias = inputs((5, size, 37), BF16, True)
    exact = reference.matmul(*double(x, weight, bias))
    assert_honest(matmul(x, weight, bias), reference.matmul(x, weight, bias), exact)


@pytest.mark.interpreter
@pytest.mark.parametrize("splits", [1, 4])
def test_a_row_is_the_same_in_any_batch(monkeypatch: pytest.MonkeyPatch, splits: int) -> None:
    """Bit for bit, also where the tile is another."""
    launching(monkeypatch, splits=splits)
    x, weight, _ = inputs((MOST_ROWS, 300, 20), BF16, False)
    together = matmul(x, weight)
    for rows in (1, 2, 15, 16, 17, 32, 33, 63):
        assert_equal(matmul(x[:rows], weight), together[:rows])
        assert_equal(matmul(x[-rows:], weight), together[-rows:])


@pytest.mark.interpreter
@pytest.mark.parametrize(("splits", "expected"), [(1, 2.0**24), (2, 2.0**24 + 2)])
def test_the_order_of_a_sum_is_the_same_in_any_batch(
    monkeypatch: pytest.MonkeyPatch, splits: int, expected: float
) -> None:
    """The first of four tiles sums to 2^24, where a 1 is lost and a 2 is not."""
    launching(monkeypatch, splits=splits)
    weight = torch.zeros(1, 128)
    weight[0, ::32] = torch.tensor([2.0**24, 1, 1, 1])
    for rows in (1, 16, 17, 32, 64):
        assert_equal(matmul(torch.ones(rows, 128), weight), torch.full((rows, 1), expected))


@pytest.mark.interpreter
def test_more_rows_are_torchs() -> None:
    x, weight, bias = inputs((MOST_ROWS + 1, 70, 20), torch.float32, True)
    expected = torch.mm(x, weight.T) + bias
    assert_equal(matmul(x, weight, bias), expected)
    torch.testing.assert_close(matmul(x[1:], weight, bias), expected[1:])


@pytest.mark.interpreter
def test_a_workspace_is_all_that_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    launching(monkeypatch, splits=4)
    x, weight, bias = inputs((3, 256, 20), BF16, True)
    expected = matmul(x, weight, bias)
    size = workspace_size(3, weight)
    workspace = torch.zeros(size)
    out = torch.full((3, 20), 7.0, dtype=BF16)
    message = f"^workspace has {size - 1} elements; legal for these tensors: at least {size}$"
    with pytest.raises(ValueError, match=message):
        matmul(x, weight, bias, out=out, workspace=workspace[1:])
    assert (out == 7.0).all()
    monkeypatch.setattr(torch, "empty", None)
    assert_equal(matmul(x, weight, bias, out=out, workspace=workspace), expected)


@pytest.mark.interpreter
def test_the_public_function_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As large as the kernel needs for its most rows, and none without a kernel or a split."""
    launching(monkeypatch, splits=2)
    weight = torch.randn(20, 256)
    assert kernels.matmul_workspace(3, weight).numel() == 0
    monkeypatch.setenv("FASTLLAMA_BACKEND", "triton")
    made = kernels.matmul_workspace(3, weight)
    tiles = 3  # of 16 features, of which a gated weight may have one more
    assert made.numel() == COUNTERS + 2 * 3 * tiles * (16 + 1)
    assert_equal(made, torch.zeros_like(made))
    assert kernels.matmul_workspace(1000, weight).numel() == COUNTERS + 2 * MOST_ROWS * tiles * (16 + 1)
    launching(monkeypatch, splits=1)
    assert kernels.matmul_workspace(3, weight).numel() == 0


@pytest.mark.parametrize(
    ("features", "size", "splits"),
    [
        (12288, 4096, 4),  # a 7B's fused qkv: 192 tiles
        (4096, 4096, 8),  # o: no more, or a split would have fewer than four tiles of 128
        (22016, 4096, 2),  # gate and up
        (4096, 11008, 8),  # down
        (32000, 4096, 1),  # the head
        (57344, 8192, 1),  # a 70B's gate and up
        (8192, 28672, 4),  # its down
        (64, 64, 1),
    ],
)
def test_splits_fill_the_gpu_and_are_not_too_short(features: int, size: int, splits: int) -> None:
    launch = heuristics.matmul_heuristic(H200, features=features, size=size, itemsize=2)
    assert launch == heuristics.MatmulLaunch(64, 128, splits, 4, 4)


@pytest.mark.parametrize(("itemsize", "columns"), [(2, 128), (4, 32)])
@pytest.mark.parametrize("shared", [64 << 10, 99 << 10, 163 << 10, 227 << 10])
def test_tiles_fit(itemsize: int, columns: int, shared: int) -> None:
    launch = heuristics.matmul_heuristic(
        Device("", "sm_80", 108, 32, shared, 1), features=4096, size=4096, itemsize=itemsize
    )
    assert launch.size == columns
    assert launch.stages * (launch.features + MOST_ROWS) * launch.size * itemsize <= shared


def test_nothing_depends_on_the_number_of_rows_but_the_tile_and_the_memory() -> None:
    weight = torch.empty(4096, 11008, dtype=BF16, device="meta")
    plans = [module._plan(rows, weight) for rows in (1, 2, 16, 64)]
    assert len({(launch, splits.columns, splits.count) for launch, splits in plans}) == 1
