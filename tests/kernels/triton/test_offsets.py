"""No kernel computes in 32 bits an offset that may overflow: strides may be 2^30, and rows many.

Every launch is compiled with strides of heads, pages and slots near 2^30 (from 2^31 on Triton widens them itself), and
the matmuls besides with weights of 2^17 features and columns.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fastllama.catalogue import matmuls, rotary
from fastllama.catalogue.arguments import in_order, positional
from fastllama.catalogue.maker import Arguments, Maker
from fastllama.catalogue.table import small_call
from fastllama.kernels.dispatch.op import OPS
from fastllama.kernels.launch.kernel_call import KernelCall
from fastllama.testing.offsets import LIMITS, Narrow, narrow_offsets
from fastllama.testing.recorder import record
from fastllama.testing.targets import TARGETS
from fastllama.testing.triton_ir import triton_ir
from tests.kernels.triton import launches as shipped_launches
from tests.kernels.triton.launch_cases import CASES
from tests.kernels.triton.launches import BF16, META, Shipped, on

pytestmark = pytest.mark.compile
TARGET = "sm_90"  # offsets are the same on all
OPS_IN_TRITON = [name for name, op in OPS.items() if op.has_triton]
FAR = 1 << 30
LARGE = 1 << 17, 1 << 17  # features and columns of a weight: 2^34 elements
# Axis 0 counts tiles of the weight's features.
OF_A_WEIGHT = {"matmul_dense_kernel", "matmul_quantized_kernel", "dequantize_kernel"}
# What no range shows: a row of q, as the branch on it keeps it between two numbers of rows.
BOUNDED = {("attention_prefill_kernel", "first_row")}


def far(call: Arguments) -> Arguments:
    """The call with each tensor of three or more dimensions spread out, by strides that all differ.

    A compiler merges two equal multiplications, and keeps one place in the source.
    """
    strides = (FAR + 64 * k for k in itertools.count(1))
    return {
        name: torch.empty_strided(
            value.shape, [*itertools.islice(strides, value.dim() - 1), 1], dtype=value.dtype, device=META
        )
        if isinstance(value, Tensor) and value.dim() > 2 and "packed" not in name
        else value
        for name, value in call.items()
    }


def narrow(launch: Callable[[], Any]) -> list[str]:
    """Offsets that may overflow in a call's launches. Axis 0 counts rows, of any number; other axes are the call's."""
    grids: list[tuple[int, ...]] = []
    stock = KernelCall.launch

    def noted(call: KernelCall) -> Any:
        grids.append(call.grid)
        return stock(call)

    with on(TARGET), record(TARGETS[TARGET]) as launches, mock.patch.object(KernelCall, "launch", noted):
        launch()
    assert launches
    return [
        str(found)
        for each, grid in zip(launches, grids, strict=True)
        for found in narrow_offsets(triton_ir(each), (grid[0] if each.kernel in OF_A_WEIGHT else LIMITS[0], *grid[1:]))
        if not is_bounded(found)
    ]


def is_bounded(found: Narrow) -> bool:
    return (found.kernel, found.code.split(" = ")[0]) in BOUNDED


def launching(op: str, call: Arguments) -> Callable[[], Any]:
    return lambda: OPS[op].launcher("cuda")(*positional(op, far(call)))


@pytest.mark.parametrize("shipped", CASES)
def test_no_shipped_launch(shipped: Shipped, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped_launches, "positional", lambda op, call: positional(op, far(call)))
    assert narrow(shipped.call) == []


def forms() -> Iterator[Any]:
    """For each op a call with all optional tensors, on pages of 7 tokens, and calls that compile another program."""
    for op in OPS_IN_TRITON:
        yield pytest.param(op, {}, id=op)
    for op in ("rope", "rope_and_write_kv"):
        yield pytest.param(op, {"interleaved": True}, id=f"{op}, interleaved")
    for op in ("attention_decode", "attention_prefill", "attention_varlen"):
        yield pytest.param(op, {"lse_out": torch.empty(3, 6)}, id=f"{op}, lse")


@pytest.mark.parametrize(("op", "more"), list(forms()))
def test_no_small_call(op: str, more: Arguments) -> None:
    assert narrow(launching(op, small_call(op) | more)) == []


def test_not_where_part_of_a_head_is_rotated() -> None:
    call = rotary.rope(Maker(BF16, META), 3, 6, 2, 80, rotated=32)
    assert narrow(launching("rope", in_order("rope", call))) == []


# Many rows take torch's matmul with the dequantized weight, and matmul_w8a8 another tile.
PRODUCTS = [
    (matmuls.matmul, {"form": "norm, gated"}, 16),
    (matmuls.matmul, {"form": "residual"}, 16),
    (matmuls.matmul_int4, {"zeros": torch.uint8}, 16),
    (matmuls.matmul_int4, {"zeros": torch.uint8}, 1024),
    (matmuls.matmul_int4, {"form": "norm, gated"}, 16),
    (matmuls.matmul_int8, {"group": 32}, 16),
    (matmuls.matmul_int8, {"group": 32}, 1024),
    (matmuls.matmul_int8, {"form": "residual"}, 16),
    (matmuls.matmul_w8a8, {"form": "bias"}, 16),
    (matmuls.matmul_w8a8, {"form": "bias"}, 1024),
]


@pytest.mark.parametrize(("make", "options", "rows"), PRODUCTS)
def test_no_product_with_a_weight_of_two_to_the_34_elements(
    make: Callable[..., Arguments], options: Arguments, rows: int
) -> None:
    call = make(Maker(BF16, META), rows, *LARGE, **options)
    assert narrow(launching(make.__name__, in_order(make.__name__, call))) == []
