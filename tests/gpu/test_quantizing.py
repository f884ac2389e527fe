"""Quantizing on the device gives the CPU's model, but for another rounding of the layers' inputs."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastllama.bench.models import random_model
from fastllama.layers.model import LlamaForCausalLM
from fastllama.layers.quantizing import quantize
from fastllama.layers.weights import kept_tensors
from fastllama.quant.weight import QuantizedWeight
from tests.layers.test_loading_packed import assert_same
from tests.layers.test_quantizing import GQA, RECIPES, Kept, divergence, texts

pytestmark = pytest.mark.gpu

CPU, DEVICE = torch.device("cpu"), torch.device("cuda", 0)
CONFIG = replace(GQA, hidden_size=256, intermediate_size=512, head_dim=64)
READ, UNSEEN = texts(*[128] * 16, 1, 65), texts(*[64] * 4, seed=5)
AGREEING = {"rtn": 0.999, "hqq": 0.99, "gptq": 0.8}  # share of equal values; AWQ may choose other exponents
recipes = pytest.mark.parametrize(("method", "scheme"), RECIPES)
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def plain(dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return random_model(CONFIG, "none", dtype, CPU)


def quantized(model: LlamaForCausalLM, at: torch.device, scheme: str, method: str, **options: Any) -> LlamaForCausalLM:
    """A copy of a model, which is at a device, quantized."""
    made = copy.deepcopy(model).to(at)
    quantize(made, scheme, method, documents=READ, progress=False, **options)
    return made


@recipes
@dtypes
def test_it_is_as_good_as_on_a_cpu(method: str, scheme: str, dtype: torch.dtype) -> None:
    model = plain(dtype)
    expected, found = (quantized(model, at, scheme, method) for at in (CPU, DEVICE))
    assert {tensor.device for tensor in found.state_dict().values()} == {DEVICE}
    found = found.to(CPU)
    same, count = 0, 0
    for (_, ours), (_, theirs) in zip(kept_tensors(found), kept_tensors(expected), strict=True):
        one, another = ours(), theirs()
        if isinstance(one, QuantizedWeight):
            assert isinstance(another, QuantizedWeight)
            assert one.form == another.form
            same, count = same + int((one.values == another.values).sum()), count + one.values.numel()
    assert same >= AGREEING.get(method, 0) * count
    lost = [divergence(each, model, UNSEEN) for each in (found, expected)]
    assert 0 < lost[0] < 1.25 * lost[1]


@pytest.mark.parametrize(("method", "scheme"), [("rtn", "int4"), ("awq+gptq", "int4"), ("smoothquant+gptq", "w8a8")])
def test_a_model_stays_where_it_is(method: str, scheme: str) -> None:
    """Its blocks go to the named device and come back, bit-identical to a model that was there."""
    model = plain(torch.bfloat16)
    for home, away in ((CPU, DEVICE), (DEVICE, CPU)):
        found = quantized(model, home, scheme, method, device=away)
        assert {tensor.device for tensor in found.state_dict().values()} == {home}
        assert_same(found.to(CPU), quantized(model, away, scheme, method).to(CPU))


@pytest.mark.parametrize(("method", "scheme"), [("hqq", "int4"), ("awq+gptq", "int4")])
def test_finished_blocks_come_back_to_the_device(method: str, scheme: str) -> None:
    model, kept = plain(torch.bfloat16), Kept()
    expected = quantized(model, DEVICE, scheme, method, finished=kept)
    left = Kept({key: {name: each.cpu() for name, each in tensors.items()} for key, tensors in [*kept.items()][:1]})
    found = quantized(model, DEVICE, scheme, method, finished=left)
    assert {tensor.device for tensor in found.state_dict().values()} == {DEVICE}
    assert_same(found, expected)
