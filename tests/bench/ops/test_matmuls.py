"""The arguments of torch's own quantized matmuls: on a CPU, and on a stand-in for the one that needs a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama.bench.ops import judge, matmuls
from fastllama.bench.ops.formulas import Function
from fastllama.bench.ops.peers import torch_peers
from fastllama.catalogue.llama_calls import LlamaCall
from tests.bench.ops.grouped import GROUPED, assert_prepared_once, matmul_arguments

CPU = torch.device("cpu")
BF16 = torch.bfloat16


def check(op: str, function: Function, dtype: torch.dtype = BF16) -> None:
    error, bound = judge.judged(LlamaCall(op, GROUPED, 5, 0, dtype), function, CPU)
    assert error <= bound


class Aten:
    """tinygemm as int4mm.cu takes it, on top of the op of CPUs, which means the same by scales and zeros."""

    def __init__(self) -> None:
        self.packed = 0

    def _convert_weight_to_int4pack(self, pairs: Tensor, tiles: int) -> Tensor:
        """pairs [N, K / 2] uint8, even columns in the upper bits -> [N / 8, K / (16 tiles), 32, tiles / 2] int32."""
        self.packed += 1
        assert pairs.dtype == torch.uint8
        assert tiles in (2, 4, 8)
        rows, columns = pairs.shape[0], 2 * pairs.shape[1]
        codes = torch.stack((pairs >> 4, pairs & 15), -1).flatten(1).int()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, tiles)
        return packed.view(torch.int32).view(rows // 8, columns // (16 * tiles), 32, tiles // 2)

    def _weight_int4pack_mm(self, x: Tensor, packed: Tensor, group: int, scales_and_zeros: Tensor) -> Tensor:
        """x [M, K], scales_and_zeros [K / group, N, 2], both bf16 and contiguous."""
        assert x.dtype == scales_and_zeros.dtype == BF16
        assert scales_and_zeros.is_contiguous()
        assert group in (32, 64, 128, 256)
        assert scales_and_zeros.shape == (x.shape[1] // group, 8 * packed.shape[0], 2)
        bytes_ = packed.view(torch.uint8).view(8 * packed.shape[0], x.shape[1] // 2)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, bytes_, group, scales_and_zeros)


@pytest.mark.parametrize("op", ["matmul_int4", "matmul_int8", "matmul_w8a8"])
def test_torchs_own_are_offered(op: str) -> None:
    own = {"matmul_int4": "_weight_int4pack_mm", "matmul_int8": "_weight_int8pack_mm", "matmul_w8a8": "_int_mm"}[op]
    assert {"F.linear, unquantized", own} <= set(torch_peers(op, torch.device("cuda")))
    assert (own in torch_peers(op, CPU)) == (op != "matmul_int4")  # there by another name, in another layout


@pytest.mark.parametrize("op", ["matmul_bf12", "matmul_int4", "matmul_int8"])
def test_the_unquantized_matmul_is_that_of_all_groups(op: str) -> None:
    check(op, matmuls.linear())


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own
def test_int_mm_as_it_is_timed_is_right() -> None:
    """Scaled by inductor, as on a GPU: the judge's tests only walk it."""
    with torch.inference_mode():
        check("matmul_w8a8", matmuls.int_mm("inductor"))


def test_tinygemm_gets_our_quantized_values_and_scales() -> None:
    check("matmul_int4", matmuls.tinygemm(Aten()))


def test_a_weight_is_prepared_once_and_never_taken_for_another() -> None:
    library = Aten()
    assert_prepared_once(matmuls.tinygemm(library), library)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": torch.float16}, "x and scales of torch.float16: only torch.bfloat16"),
        ({"group": 192, "shape": (192, 192)}, "groups of 192: only"),
        ({"group": 64, "shape": (192, 192)}, r"a weight of \(192, 192\): only multiples of \(8, 128\)"),
        ({"shape": (188, 256)}, r"a weight of \(188, 256\): only multiples of \(8, 128\)"),
    ],
)
def test_tinygemm_refuses_what_it_cannot_take(options: dict[str, Any], said: str) -> None:
    with pytest.raises(NotImplementedError, match=said):
        matmuls.tinygemm(Aten())(matmul_arguments(**options))


def test_int8pack_refuses_groups() -> None:
    with pytest.raises(NotImplementedError, match="groups of 128: only one scale for a row"):
        matmuls.int8pack()(LlamaCall("matmul_int8", GROUPED, 3, 0, BF16).make(CPU, seed=0))
