"""Weights packed while loading, and quantized ones loaded as they are: layers, memory, and what is refused."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastllama import kernels
from fastllama.errors import CheckpointError
from fastllama.layers import packing
from fastllama.layers.config import LlamaConfig
from fastllama.layers.linear import Linear
from fastllama.layers.loading import load_weights
from fastllama.layers.model import LlamaForCausalLM
from fastllama.layers.quantization import KINDS
from fastllama.layers.quantized import LINEARS, QuantizedLinear
from fastllama.layers.weights import HEAD, kept_tensors, slots
from fastllama.quant.rounding import round_to_nearest
from fastllama.quant.weight import QuantizedWeight

CPU = torch.device("cpu")
# Keys have 32 rows, half a tile of 64; queries and gates fill whole tiles, or not.
SMALL = LlamaConfig(48, 128, 192, 2, 4, 1, 32)
SHAPES = {
    "half tiles": SMALL,
    "whole tiles": replace(SMALL, num_key_value_heads=2),
    "odd rows": replace(SMALL, intermediate_size=160, head_dim=18, num_key_value_heads=4),
    "biases": replace(SMALL, attention_bias=True, mlp_bias=True),
    "tied": replace(SMALL, tie_word_embeddings=True),
}
Q, K, V = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv")
shapes = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
kinds = pytest.mark.parametrize("kind", LINEARS)


def tensors_of(config: LlamaConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(config, dtype, "meta")
    shapes = {name: (slot.rows, *model.get_parameter(slot.parameter).shape[1:]) for name, slot in slots(config).items()}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def quantized(config: LlamaConfig, kind: str, group_size: int = 128) -> dict[str, Tensor | QuantizedWeight]:
    """The tensors with each linear layer but the head quantized."""
    return {
        name: round_to_nearest(tensor, kind, group_size) if name.endswith("_proj.weight") else tensor
        for name, tensor in tensors_of(config).items()
    }


def loaded(
    config: LlamaConfig,
    tensors: dict[str, Tensor | QuantizedWeight] | Iterator[tuple[str, Tensor]],
    kind: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> LlamaForCausalLM:
    model = LlamaForCausalLM(config, dtype, "meta")
    pairs = tensors.items() if isinstance(tensors, dict) else tensors
    load_weights(model, pairs, device=CPU, pack=packing.packer(model, kind, device=CPU))
    return model


def state(model: LlamaForCausalLM) -> dict[str, tuple[str, Tensor]]:
    """Every tensor of a model, with the kind of the layer that holds it."""
    return {
        f"{path}.{name}": (type(module).__name__, tensor)
        for path, module in model.named_modules()
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    }


def assert_same(found: LlamaForCausalLM, expected: LlamaForCausalLM) -> None:
    ours, theirs = state(found), state(expected)
    assert ours.keys() == theirs.keys()
    for name, (kind, tensor) in ours.items():
        assert kind == theirs[name][0], name
        assert torch.equal(tensor, theirs[name][1]), name
    assert (found.lm_head.weight is found.embed_tokens.weight) == found.config.tie_word_embeddings


@shapes
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_packing_as_weights_come_gives_what_packing_afterwards_gives(config: LlamaConfig, kind: str | None) -> None:
    tensors = tensors_of(config, torch.bfloat16)
    expected = LlamaForCausalLM(config, torch.bfloat16, CPU)
    load_weights(expected, tensors.items())
    packing.apply(expected, kind, progress=False)
    assert_same(loaded(config, tensors, kind, torch.bfloat16), expected)
    assert_same(loaded(config, dict(reversed(tensors.items())), kind, torch.bfloat16), expected)


@kinds
def test_weights_that_are_packed_are_not_kept(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 70B in 16 bits has 138 GB, and 37 GB in 4 bits."""
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    rounded = packing.round_to_nearest

    def counting(weight: Tensor, kind: str) -> QuantizedWeight:
        nonlocal most
        alive.append(weakref.ref(weight.untyped_storage()))
        most = max(most, sum(ref() is not None for ref in alive))
        return rounded(weight, kind)

    monkeypatch.setattr(packing, "round_to_nearest", counting)
    model = loaded(SMALL, tensors_of(SMALL), kind)
    assert len(alive) == 4 * SMALL.num_hidden_layers
    assert most == 1
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == len(alive)


@shapes
@kinds
@pytest.mark.parametrize("group_size", [128, 32])
def test_quantized_weights_are_taken_bit_for_bit(config: LlamaConfig, kind: str, group_size: int) -> None:
    tensors = quantized(config, kind, group_size)
    for given in (tensors, dict(reversed(tensors.items()))):
        model = loaded(config, given)
        assert packing.kind_of(model) == kind
        for name, get in kept_tensors(model):
            kept, expected = get(), tensors[name]
            if isinstance(expected, QuantizedWeight):
                assert isinstance(kept, QuantizedWeight)
                assert kept.form == expected.form
                assert kept.equals(expected), name
            else:
                assert torch.equal(kept, expected), name


def test_fused_rows_are_those_of_packing_the_whole() -> None:
    """q, k, v one by one, in rows that share tiles, and all at once."""
    tensors = quantized(SMALL, "int4")
    layer = loaded(SMALL, tensors).layers[1].self_attn.qkv_proj
    parts = [tensors[name] for name in (Q, K, V)]
    whole = QuantizedWeight("int4", *(torch.cat([getattr(p, part) for p in parts]) for part in ("values", "scales")))
    assert torch.equal(layer.packed, kernels.pack_int4(whole.values))
    assert torch.equal(layer.scales, whole.scales)


def test_zeros_count() -> None:
    tensors = quantized(SMALL, "int4")
    asymmetric = {
        name: round_to_nearest(tensor, "int4", 32, symmetric=False)
        for name, tensor in tensors_of(SMALL).items()
        if name.endswith("_proj.weight")
    }
    model = loaded(SMALL, tensors | asymmetric)
    layer = model.layers[1].self_attn.qkv_proj
    x = torch.randn(5, 128)
    expected = x.double() @ torch.cat([asymmetric[name].dequantize() for name in (Q, K, V)]).double().T
    options = {"residual": None, "out": None, "gated": False}
    found = layer.matmul(x, None, **options)
    assert torch.allclose(found.double(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert all(get().equals(asymmetric[name]) for name, get in kept_tensors(model) if name in asymmetric)


def test_the_same_tensor_twice_counts_once_also_where_it_is_packed() -> None:
    tensors = tensors_of(SMALL)
    order = [(name, tensors[name]) for name in (K, Q, V)]
    rest = [(name, tensor) for name, tensor in tensors.items() if name not in (Q, K, V)]
    for kind in (None, *LINEARS):
        loaded(SMALL, iter([*order, *rest, (K, tensors[K].clone())]), kind)
        with pytest.raises(CheckpointError, match=r"k_proj\.weight appears twice, with different values"):
            loaded(SMALL, iter([*order, *rest, (K, -tensors[K])]), kind)
    both = quantized(SMALL, "int8")
    again = replace(both[K], values=both[K].values.clone())
    loaded(SMALL, iter([*both.items(), (K, again)]))
    with pytest.raises(CheckpointError, match=r"k_proj\.weight appears twice, with different values"):
        loaded(SMALL, iter([*both.items(), (K, replace(again, scales=2 * again.scales))]))


def test_a_bias_may_come_before_and_after_its_weight() -> None:
    config = SHAPES["biases"]
    tensors = tensors_of(config)
    biases = [(name, tensor) for name, tensor in tensors.items() if name.endswith("bias")]
    weights = [(name, tensor) for name, tensor in tensors.items() if not name.endswith("bias")]
    for kind in (None, "int4"):
        first, last = loaded(config, iter(biases + weights), kind), loaded(config, iter(weights + biases), kind)
        assert_same(first, last)
        assert torch.equal(first.layers[1].self_attn.o_proj.bias, tensors["model.layers.1.self_attn.o_proj.bias"])
        zero = loaded(config, iter(weights), kind)
        assert not zero.layers[0].mlp.gate_up_proj.bias.any()
        assert not [name for name, (_, tensor) in state(zero).items() if tensor.is_meta]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_no_scale_is_rounded_by_a_dtype(dtype: torch.dtype, stored: torch.dtype) -> None:
    """Neither by the model's dtype nor by casts: scales of the model's dtype stay, all others are fp32."""
    tensors = {name: tensor.to(dtype) for name, tensor in tensors_of(SMALL).items()}
    weight = round_to_nearest(tensors_of(SMALL)[K], "int4")
    weight = replace(weight, scales=(weight.scales * 1.2345e-5).to(stored))  # fp16 would round these
    same = {name: replace(weight, values=weight.values) for name in (K, V)}
    q = round_to_nearest(tensors_of(SMALL)[Q], "int4")
    same[Q] = replace(q, scales=q.scales.to(stored))
    model = loaded(SMALL, tensors | same, dtype=dtype)
    kept = stored if stored == dtype else torch.float32
    assert model.layers[1].self_attn.qkv_proj.scales.dtype == kept
    for cast in (None, torch.float16, torch.bfloat16, torch.float32):
        model = model if cast is None else model.to(cast)
        scales = model.layers[1].self_attn.qkv_proj.scales
        assert scales.dtype in (torch.float32, model.dtype)
        assert torch.equal(scales[128:160].double(), weight.scales.double())
        if stored == torch.float32:
            assert scales.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            V,
            lambda w: round_to_nearest(w, "int8"),
            r"v_proj\.weight is int8 in whole rows, and what it is fused with",
        ),
        (V, lambda w: round_to_nearest(w, "int4", 32), r"is int4 in groups of 32, and .* is int4 in whole rows"),
        (V, lambda w: round_to_nearest(w, "int4", 128, symmetric=False), "with zeros, and what it is fused with"),
        (V, lambda w: w, r"v_proj\.weight is not quantized, and what it is fused with is: int4"),
        (K, lambda w: round_to_nearest(w[:16], "int4"), r"has shape \[16, 128\], expected \[32, 128\] by the config"),
        (HEAD, lambda w: None, "is missing"),
        ("model.embed_tokens.weight", lambda w: round_to_nearest(w, "int8"), "legal of linear layers alone"),
        ("model.layers.0.extra.weight", lambda w: round_to_nearest(torch.ones(4, 4), "int8"), "is unexpected"),
    ],
    ids=["kind", "group", "zeros", "dense", "shape", "missing", "embedding", "unexpected"],
)
def test_what_does_not_fit_is_refused(name: str, change: object, message: str) -> None:
    plain, tensors = tensors_of(SMALL), quantized(SMALL, "int4")
    found = change(plain.get(name))  # type: ignore[operator]
    if found is None:
        del tensors[name]
    else:
        tensors[name] = found
    with pytest.raises(CheckpointError, match=message):
        loaded(SMALL, tensors)


def test_a_quantized_part_after_a_plain_one_is_refused() -> None:
    tensors = quantized(SMALL, "int4")
    tensors[Q] = tensors_of(SMALL)[Q]
    with pytest.raises(CheckpointError, match=r"k_proj\.weight is int4 .* and what it is fused or tied with is not"):
        loaded(SMALL, tensors)


def test_scales_that_are_no_numbers_are_refused() -> None:
    tensors = quantized(SMALL, "int4")
    tensors[K] = replace(tensors[K], scales=tensors[K].scales / 0)
    with pytest.raises(CheckpointError, match=r"k_proj\.weight has scales of NaN or infinity"):
        loaded(SMALL, tensors)


def test_a_head_may_be_quantized_where_it_is_not_tied() -> None:
    tensors = quantized(SMALL, "int8")
    tensors[HEAD] = round_to_nearest(tensors_of(SMALL)[HEAD], "int8")
    assert type(loaded(SMALL, tensors).lm_head) is LINEARS["int8"]
    tied = replace(SMALL, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is quantized"):
        loaded(tied, tensors)


def test_kinds_are_distinguished() -> None:
    model = loaded(SMALL, quantized(SMALL, "w8a8"))
    with pytest.raises(ValueError, match="quantization is 'int4' for weights in w8a8; legal: 'auto', None or 'w8a8'"):
        packing.resolve(model, "int4", kept=packing.kind_of(model))
    assert packing.resolve(model, "w8a8", kept="w8a8") is None, "what the checkpoint left dense is not rounded"
    assert packing.resolve(model, None, kept="w8a8") is None
    assert packing.kind_of(LlamaForCausalLM(SMALL, torch.float32, "meta")) is None
    assert isinstance(model.lm_head, Linear)
