"""A fused layer over the memory of a transformers model's linear layers: who owns it, and when there is none."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fastllama
from fastllama.integrations.transformers.fused import Apart, fuse, joined
from fastllama.integrations.transformers.linears import HF_LINEARS
from fastllama.layers.linear import Linear
from fastllama.layers.quantized import LINEARS
from fastllama.quant.rounding import round_to_nearest
from fastllama.quant.weight import QuantizedWeight
from tests.integrations.models import assert_close, llama
from tests.integrations.quantized import KINDS, TILES, addresses, layers_of, logits, pair, quantized


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_tensors_stay_the_models_and_lie_in_the_fused_ones(bias: bool, zeros: bool) -> None:
    plain, patched = pair(zeros=zeros, sizes=TILES | {"attention_bias": bias, "mlp_bias": bias})
    state, expected = patched.state_dict(), plain.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in state)
    for layer, (qkv, o_proj, gate_up, down_proj) in zip(patched.model.layers, layers_of(patched), strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        groups = {
            qkv: [attention.q_proj, attention.k_proj, attention.v_proj],
            o_proj: [attention.o_proj],
            gate_up: [mlp.gate_proj, mlp.up_proj],
            down_proj: [mlp.down_proj],
        }
        for whole, linears in groups.items():
            for name in ("packed", "scales", "zeros", "bias"):
                tensor = getattr(whole, name)
                if tensor is None:
                    assert name in ("zeros", "bias")
                    continue
                end = tensor.data_ptr()
                for linear in linears:
                    part = getattr(linear, name)
                    assert part.data_ptr() == end
                    assert part.untyped_storage().nbytes() == part.nbytes  # what libraries that save weights ask
                    end += part.nbytes
                assert end == tensor.data_ptr() + tensor.nbytes  # no byte beside the model's


@pytest.mark.parametrize("first", ["patch", "fuse"])
@pytest.mark.parametrize("kind", ["dense", *KINDS])
def test_memory_is_joined_once_whoever_asks_first(kind: str, first: str) -> None:
    model = llama(**TILES | {"attention_bias": True})
    if kind != "dense":
        quantized(model, kind)
    attention = model.model.layers[0].self_attn
    linears = [attention.q_proj, attention.k_proj, attention.v_proj]
    found = fuse(linears) if first == "fuse" else fastllama.patch(model)
    where = addresses(linears)
    again = fuse(linears) if first == "patch" else fastllama.patch(model)
    assert addresses(linears) == where
    fused = found if first == "fuse" else again
    assert type(fused) is (Linear if kind == "dense" else LINEARS[kind])
    assert set(addresses([fused])) <= set(where)


@pytest.mark.parametrize("kind", ["dense", *KINDS])
def test_what_is_done_to_one_fused_layer_is_not_done_to_another(kind: str) -> None:
    """Two fused layers over one model's weights, one of a patched model and one of a runtime."""
    model = llama(**TILES | {"attention_bias": True})
    if kind != "dense":
        quantized(model, kind)
    fastllama.patch(model, strict=True)
    expected = logits(model)
    attention = model.model.layers[0].self_attn
    linears = [attention.q_proj, attention.k_proj, attention.v_proj]
    where = addresses(linears)
    runtime: Any = fuse(linears)
    runtime.to(torch.bfloat16)
    for name in ("packed", "scales", "weight"):
        if name in runtime._buffers or name in runtime._parameters:
            tensor = getattr(runtime, name)
            tensor.data = tensor.data.clone()
    assert torch.equal(logits(model), expected)
    again = fuse(linears)  # by the layer that still has the memory
    assert again is not None
    assert addresses(linears) == where
    del runtime, again
    assert fuse(linears) is not None
    assert addresses(linears) == where


def layer_of(rows: int, kind: str = "int4", columns: int = 128, bias: bool = False, **form: Any) -> Any:
    group_size, scales, zeros = form.get("group_size", 32), form.get("scales", torch.float32), form.get("zeros")
    linear = nn.Linear(columns, rows, bias=bias)
    if kind == "dense":
        return linear.to(scales)
    weight = round_to_nearest(linear.weight.detach(), kind, group_size, symmetric=not zeros)
    floats = weight.zeros if zeros is None or zeros == torch.uint8 else weight.zeros.to(zeros)
    kept = QuantizedWeight(kind, weight.values, weight.scales.to(scales), floats)
    return HF_LINEARS[kind].of(kept, linear.bias)


@pytest.mark.parametrize("rows", [(64, 128, 64), (128, 64, 10), (10,), (64, 1)])
@pytest.mark.parametrize("kind", ["dense", *KINDS])
def test_layers_of_whole_tiles_are_one(kind: str, rows: tuple[int, ...]) -> None:
    linears = [layer_of(each, kind, bias=True, group_size=128) for each in rows]
    x = torch.randn(2, 3, 128)
    with torch.inference_mode():
        expected = torch.cat([linear(x) for linear in linears], -1)
        fused = fuse(linears)
        assert fused is not None
        found = fused.matmul(x, None, residual=None, gated=False, out=None)
    assert_close(found, expected)


UNLIKE: dict[str, list[Any]] = {
    "rows that are no whole tiles": [layer_of(64), layer_of(32), layer_of(64)],
    "another kind": [layer_of(64, "int8", group_size=128), layer_of(64, "w8a8", group_size=128)],
    "a dense one": [layer_of(64), layer_of(64, "dense")],
    "another group size": [layer_of(64), layer_of(64, group_size=64)],
    "scales of another dtype": [layer_of(64), layer_of(64, scales=torch.bfloat16)],
    "no zeros": [layer_of(64, zeros=torch.uint8), layer_of(64)],
    "zeros of another dtype": [layer_of(64, zeros=torch.uint8), layer_of(64, zeros=torch.float32)],
    "no bias": [layer_of(64, bias=True), layer_of(64)],
    "other columns": [layer_of(64), layer_of(64, columns=64)],
    "dense ones of other dtypes": [layer_of(64, "dense"), layer_of(64, "dense", scales=torch.bfloat16)],
}


@pytest.mark.parametrize("name", UNLIKE)
def test_layers_that_are_not_alike_are_not_one(name: str) -> None:
    linears = copy.deepcopy(UNLIKE[name])
    where = addresses(linears)
    assert fuse(linears) is None
    assert addresses(linears) == where
    assert type(joined(linears)) is Apart
    assert all(fuse([linear]) is not None for linear in linears)
