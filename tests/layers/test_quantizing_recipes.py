"""One block quantized by each method, against the same steps one by one on its layers' inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama.layers import quantizing
from fastllama.layers.block import LlamaBlock
from fastllama.layers.calibration import Calibration
from fastllama.layers.linear import Linear
from fastllama.layers.model import LlamaForCausalLM
from fastllama.layers.quantized import LINEARS as KINDS
from fastllama.layers.quantized import QuantizedLinear
from fastllama.layers.quantizing import quantize
from fastllama.layers.rescaling import GATE_UP, LINEARS, OUT, QKV, rescale
from fastllama.quant import activations
from fastllama.quant.activations import Activations
from fastllama.quant.gptq import gptq
from fastllama.quant.hqq import hqq
from fastllama.quant.rounding import clipped, on_grid, round_to_nearest
from fastllama.quant.scaling import awq_scales, smoothquant_scales
from fastllama.quant.weight import QuantizedWeight
from fastllama.verify import plant_outliers
from tests.layers.test_loading_packed import assert_same
from tests.layers.test_quantizing import DOCUMENTS, GQA, RECIPES, Kept, logits, quantized, random_model

CPU = torch.device("cpu")
TOKENS = sum(map(len, DOCUMENTS))
BLOCK = replace(GQA, hidden_size=128, intermediate_size=256, num_hidden_layers=1)  # 128 divides all columns
READ = [each for each in RECIPES if each[0] not in ("rtn", "hqq")]
CASES = [(*each, size) for each in RECIPES for size in ((None,) if each[1] == "w8a8" else (None, 32))]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


class AllRows(Activations):
    """A layer's inputs: all rows, besides those that are sampled."""

    def __init__(self, size: int) -> None:
        super().__init__(size, TOKENS, CPU, hessian=True)
        self._all: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        super().add(x)
        self._all.append(x.float())

    @property
    def largest(self) -> Tensor:
        return torch.cat(self._all).abs().amax(0)


def uneven_model(dtype: torch.dtype) -> LlamaForCausalLM:
    """Channels of norms, of v and of up differ in size as exp(n): scaling them pays."""
    model = random_model(BLOCK, dtype)
    for block in model.layers:
        for path in ("input_layernorm", "post_attention_layernorm", QKV, GATE_UP):
            weight = block.get_parameter(f"{path}.weight")
            sizes = torch.randn(len(weight)).exp().to(dtype)
            weight.mul_(sizes.view(-1, *[1] * (weight.dim() - 1)))
    return model


def fed(model: LlamaForCausalLM, block: LlamaBlock) -> dict[str, AllRows]:
    seen = {name: AllRows(block.get_parameter(f"{name}.weight").shape[1]) for name in LINEARS}
    Calibration(model, DOCUMENTS, CPU).run(block, seen)
    return seen


def of_heads(name: str, channels: Tensor, reduce: Callable[[Tensor, int], Tensor]) -> Tensor:
    """In o_proj, query heads that share a key-value head have one scale for each of its channels."""
    if name != OUT:
        return channels
    share = BLOCK.num_attention_heads // BLOCK.num_key_value_heads
    heads = channels.view(-1, share, BLOCK.head_dim)
    return torch.cat([reduce(each, 0).repeat(share) for each in heads])


def scales_by_hand(method: str, name: str, weight: Tensor, seen: AllRows, group_size: int | None) -> Tensor:
    if "awq" in method:
        magnitudes = of_heads(name, seen.absmean, torch.mean)
        return awq_scales(
            weight, seen.rows, magnitudes, lambda each: round_to_nearest(each, "int4", group_size).dequantize()
        )
    columns = of_heads(name, weight.abs().amax(0), torch.amax)
    return smoothquant_scales(weight, seen.rows, of_heads(name, seen.largest, torch.amax), columns)


def rounded_by_hand(
    method: str, scheme: str, weight: Tensor, hessian: Tensor, group_size: int | None, dtype: torch.dtype
) -> QuantizedWeight:
    if method == "hqq":
        return hqq(weight, group_size, dtype)
    start = round_to_nearest(weight, scheme, group_size)
    start = replace(start, scales=start.scales.to(dtype))
    if "gptq" not in method:
        return on_grid(weight, start)
    return gptq(weight, hessian, clipped(weight, start) if scheme == "int4" else start)


@dtypes
@pytest.mark.parametrize(("method", "scheme", "group_size"), CASES)
def test_a_block_is_what_its_steps_give_one_by_one(
    method: str, scheme: str, group_size: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales of all layers from the original block, then inputs divided by the columns' factors, then quantized values.

    Of 115 rows 24 are sampled, and each layer has channels that are largest in none of these.
    """
    monkeypatch.setattr(activations, "SAMPLED", 24)
    model = uneven_model(dtype)
    block = copy.deepcopy(model.layers[0])
    assert isinstance(block, LlamaBlock)
    seen = fed(model, block)
    assert all((each.largest > each.rows.abs().amax(0)).any() for each in seen.values())
    weights = {name: block.float().get_parameter(f"{name}.weight") for name in LINEARS}
    if method.startswith(("awq", "smoothquant")):
        found = {name: scales_by_hand(method, name, weights[name], seen[name], group_size) for name in LINEARS}
        for name, scales in found.items():
            assert scales.amax() > 1.5 * scales.amin(), "no scaling at all would test nothing"
            seen[name].divide(rescale(block, BLOCK, name, scales, dtype))
    quantize(model, scheme, method, documents=DOCUMENTS, group_size=group_size, progress=False)
    for name, weight in weights.items():
        layer = model.layers[0].get_submodule(name)
        assert isinstance(layer, QuantizedLinear)
        expected = rounded_by_hand(method, scheme, weight.detach(), seen[name].hessian, group_size, dtype)
        assert layer.quantized_rows(0, layer.out_features).equals(expected), name
    for path in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        assert torch.equal(model.layers[0].get_parameter(path), block.get_parameter(path).to(dtype))


def test_blocks_of_another_version_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may compute blocks differently."""
    kept = Kept()
    for version in ("1.0", "1.0", "1.1"):
        monkeypatch.setattr(quantizing, "__version__", version)
        quantized("rtn", "int4", finished=kept)
    assert len(kept) == 2 * 2


@pytest.mark.parametrize(("method", "scheme"), RECIPES)
@pytest.mark.parametrize("name", ["input_layernorm", "post_attention_layernorm", *LINEARS])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_weight_that_is_not_finite_is_named(method: str, scheme: str, name: str, value: float) -> None:
    model = random_model()
    model.layers[1].get_parameter(f"{name}.weight").view(-1)[5] = value
    with pytest.raises(ValueError, match=rf"^layers\.1\.{name}\.weight holds infinity or NaN; legal: finite numbers$"):
        quantize(model, scheme, method, documents=DOCUMENTS, progress=False)
    assert [type(block.mlp.down_proj) for block in model.layers] == [KINDS[scheme], Linear]


@pytest.mark.parametrize(("method", "scheme"), READ)
def test_the_first_layer_that_an_infinity_reaches_is_named(method: str, scheme: str) -> None:
    """All layers after it get infinity or NaN, too."""
    model = random_model().half()
    model.layers[1].self_attn.qkv_proj.weight[-model.config.kv_size :] = 3e4
    with pytest.raises(ValueError, match=rf"^layers\.1\.{OUT} is fed infinity or NaN by the calibration text"):
        quantize(model, scheme, method, documents=DOCUMENTS, progress=False)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (None, "documents is None; legal: a list of lists of token ids"),
        ((ids for ids in DOCUMENTS), "documents is <generator.*; legal: a list of lists of token ids"),
        (DOCUMENTS[1], r"document 0 is \d+; legal: a list of token ids"),
        (torch.tensor(DOCUMENTS[1]), r"document 0 is tensor\(\d+\); legal: a list of token ids"),
        ([DOCUMENTS[1], torch.ones(1, 3, dtype=torch.int64)], "document 1 is tensor.*; legal: a list of token ids"),
        ([DOCUMENTS[1], (each for each in DOCUMENTS[2])], "document 1 is <generator.*; legal: a list of token ids"),
    ],
)
def test_documents_that_are_no_lists_are_refused(documents: Any, message: str) -> None:
    model = random_model()
    with pytest.raises(TypeError, match=f"^{message}$"):
        quantize(model, documents=documents, progress=False)
    assert_same(model, random_model())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"documents": [DOCUMENTS]}, r"document 0 holds token \[\d+\]; legal: 0 to 63"),
        ({"device": "meta"}, "device type is 'meta'.*legal values: 'cpu', 'cuda'"),
    ],
)
def test_nested_documents_and_a_device_that_computes_nothing_are_refused(
    arguments: dict[str, Any], message: str
) -> None:
    model = random_model()
    with pytest.raises(ValueError, match=f"^{message}$"):
        quantize(model, **({"documents": DOCUMENTS, "progress": False} | arguments))
    assert_same(model, random_model())


@pytest.mark.parametrize("model", ["tiny", None, torch.nn.Linear(2, 2)])
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(TypeError, match=rf"^model is a {type(model).__name__}; legal: a LlamaForCausalLM"):
        quantize(model, documents=DOCUMENTS, progress=False)


@pytest.mark.parametrize(("method", "scheme"), [("gptq", "int4"), ("awq", "int4"), ("smoothquant+gptq", "w8a8")])
def test_a_model_made_in_inference_mode_is_planted_and_quantized_as_any_other(method: str, scheme: str) -> None:
    expected = random_model()
    plant_outliers(expected)
    with torch.inference_mode():
        found = random_model()
    assert found.norm.weight.is_inference()
    plant_outliers(found)
    assert_same(found, expected)
    for model in (found, expected):
        quantize(model, scheme, method, documents=DOCUMENTS, progress=False)
    assert_same(found, expected)
    assert torch.equal(logits(found, DOCUMENTS[1]), logits(expected, DOCUMENTS[1]))
