"""What the peers of products by codes hand over: to torch's own on a CPU, and to stand-ins for what needs a GPU."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.ops import matmul_peers as product
from benchmarks.ops.attention_peers import Function
from benchmarks.ops.inputs import Inputs
from benchmarks.ops.peers import LIBRARIES, peers
from benchmarks.ops.registry import TOY, Case
from fastllama import kernels

CPU = torch.device("cpu")
BF16 = torch.bfloat16
GROUPED = dataclasses.replace(TOY, name="grouped", hidden=256)  # two groups of 128


def judged(op: str, function: Function, dtype: torch.dtype = BF16) -> None:
    error, bound = Case(op, GROUPED, 5, 0, dtype).judge(function, CPU)
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


class Gemlite:
    """As much of gemlite.core as the peer calls, of 0.6: the library itself needs a GPU to be imported."""

    def __init__(self) -> None:
        self.TORCH_TO_DTYPE = {torch.float16: "fp16", BF16: "bf16", torch.float32: "fp32"}
        self.packed = 0

    def GemLiteLinearTriton(
        self, W_nbits: int, group_size: int, in_features: int, out_features: int, input_dtype: str, output_dtype: str
    ) -> Any:
        assert input_dtype == output_dtype

        def pack(codes: Tensor, scales: Tensor, zeros: int | None) -> Any:
            self.packed += 1
            assert codes.dtype == (torch.uint8 if W_nbits == 4 else torch.int8)
            assert codes.is_contiguous()
            assert codes.shape == (out_features, in_features)
            grouped = codes.view(out_features, in_features // group_size, group_size).float() - (zeros or 0)
            weight = (grouped * scales.view(out_features, -1, 1)).flatten(1)

            def forward(x: Tensor) -> Tensor:
                assert self.TORCH_TO_DTYPE[x.dtype] == input_dtype
                return (x.float() @ weight.T).to(x.dtype)

            return forward

        return SimpleNamespace(pack=pack)


@pytest.mark.parametrize("op", ["matmul_int4", "matmul_int8", "matmul_w8a8"])
def test_torchs_own_are_offered(op: str) -> None:
    own = {"matmul_int4": "_weight_int4pack_mm", "matmul_int8": "_weight_int8pack_mm", "matmul_w8a8": "_int_mm"}[op]
    assert {"F.linear, unquantized", own} <= set(peers(op, torch.device("cuda")))
    assert (own in peers(op, CPU)) == (op != "matmul_int4")  # there by another name, in another layout


def test_gemlite_is_offered_where_it_takes_our_codes() -> None:
    (library,) = [library for library in LIBRARIES if library.distribution == "gemlite"]
    assert library.make == {"matmul_int4": ("core", product.gemlite), "matmul_int8": ("core", product.gemlite)}


@pytest.mark.parametrize("op", ["matmul_int4", "matmul_int8"])
def test_the_unquantized_product_is_that_of_all_groups(op: str) -> None:
    judged(op, product.linear())


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own
def test_int_mm_as_it_is_timed_is_right() -> None:
    """Scaled by inductor, as on a GPU: the judge's tests only walk it."""
    with torch.inference_mode():
        judged("matmul_w8a8", product.int_mm("inductor"))


def test_tinygemm_is_given_our_codes_and_scales() -> None:
    judged("matmul_int4", product.tinygemm(Aten()))


@pytest.mark.parametrize("op", ["matmul_int4", "matmul_int8"])
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_gemlite_is_given_our_codes_and_scales(op: str, dtype: torch.dtype) -> None:
    judged(op, product.gemlite(Gemlite()), dtype)


def toy(group: int = 128, dtype: torch.dtype = BF16, shape: tuple[int, int] = (192, 256)) -> Inputs:
    codes = torch.randint(16, shape, dtype=torch.uint8)
    scales = torch.randn(shape[0], shape[1] // group).to(dtype)
    return {"x": torch.randn(3, shape[1]).to(dtype), "packed": kernels.pack_int4(codes), "scales": scales}


def test_a_weight_is_prepared_once_and_never_taken_for_another() -> None:
    aten, library = Aten(), Gemlite()
    for module, run in ((aten, product.tinygemm(aten)), (library, product.gemlite(library))):
        sets = [toy(), toy()]
        first = [run(inputs) for inputs in sets]
        again = [run(inputs) for inputs in sets]
        assert module.packed == 2
        assert not torch.equal(*first)
        assert all(map(torch.equal, first, again))
        del sets, first, again
        for number in range(3, 8):  # memory that was given back would soon be another weight's
            run(toy())
            assert module.packed == number


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
        product.tinygemm(Aten())(toy(**options))


def test_int8pack_refuses_groups() -> None:
    with pytest.raises(NotImplementedError, match="groups of 128: only one scale for a row"):
        product.int8pack()(Case("matmul_int8", GROUPED, 3, 0, BF16).make(CPU, seed=0))
