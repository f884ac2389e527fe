"""The libraries that are peers: named where they are absent, offered on a GPU; the arguments that gemlite gets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.ops.libraries import LIBRARIES, Library, gemlite, libraries, peers
from fastllama.bench.ops.judge import judged
from fastllama.catalogue.llama_calls import LlamaCall
from tests.bench.ops.grouped import GROUPED, assert_prepared_once

CPU = torch.device("cpu")
BF16 = torch.bfloat16


def test_the_absence_of_a_library_is_named() -> None:
    assert set(libraries()) == {"liger-kernel", "flashinfer-python", "vllm", "flash-attn", "xformers", "gemlite"}
    assert Library("no-such-distribution", "nothing", {}).version() is None


def test_an_installed_library_is_a_peer_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library("torch", "torch.nn", {"silu_mul": ("functional", lambda module: module.silu)})
    monkeypatch.setattr("benchmarks.ops.libraries.LIBRARIES", (library, *LIBRARIES))
    assert peers("silu_mul", torch.device("cuda"))["torch"]() is torch.nn.functional.silu
    assert "torch" not in peers("rms_norm", torch.device("cuda"))
    assert "torch" not in peers("silu_mul", CPU)


class Gemlite:
    """The part of gemlite.core (0.6) that the peer calls: importing the library needs a GPU."""

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


def test_gemlite_is_offered_where_it_takes_our_packed_values() -> None:
    (library,) = [library for library in LIBRARIES if library.distribution == "gemlite"]
    assert library.make == {"matmul_int4": ("core", gemlite), "matmul_int8": ("core", gemlite)}


@pytest.mark.parametrize("op", ["matmul_int4", "matmul_int8"])
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_gemlite_gets_our_packed_values_and_scales(op: str, dtype: torch.dtype) -> None:
    error, bound = judged(LlamaCall(op, GROUPED, 5, 0, dtype), gemlite(Gemlite()), CPU)
    assert error <= bound


def test_a_weight_is_prepared_once_and_never_taken_for_another() -> None:
    library = Gemlite()
    assert_prepared_once(gemlite(library), library)
