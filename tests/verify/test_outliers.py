"""Planted outliers: the same function, of layers that are fed a few channels much larger than the others."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama import LlamaConfig, LlamaForCausalLM
from fastllama.layers import packing
from fastllama.layers.calibration import Calibration
from fastllama.layers.rescaling import DOWN, GATE_UP, LINEARS, OUT, QKV
from fastllama.quant.activations import Activations
from fastllama.verify import plant_outliers
from tests.kernels.honest import assert_equal
from tests.layers.test_model import SHAPES, ours, paged_logits
from tests.runtime.models import ours as decisive
from tests.runtime.models import prompt_of

DOCUMENTS = [prompt_of(length) for length in (20, 9, 1)]
SCALED = QKV, GATE_UP, DOWN


def planted(model: LlamaForCausalLM, **options: Any) -> LlamaForCausalLM:
    model = copy.deepcopy(model)
    plant_outliers(model, **options)
    return model


def fed(model: LlamaForCausalLM) -> list[dict[str, Tensor]]:
    """The largest magnitude of each channel that each layer of each block is fed."""
    calibration = Calibration(model, DOCUMENTS, torch.device("cpu"))
    found = []
    for block in model.layers:
        seen = {
            name: Activations(block.get_parameter(f"{name}.weight").shape[1], 30, torch.device("cpu"), hessian=False)
            for name in LINEARS
        }
        calibration.run(block, seen)
        found.append({name: each.absmax for name, each in seen.items()})
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_the_same_bit_for_bit(shape: str, dtype: torch.dtype) -> None:
    """A power of two times a float is exact, and so are all sums of the same terms: no bound is needed."""
    model = ours(shape, dtype)
    plain, changed = (
        paged_logits(each, each.config, dtype, page_size=16) for each in (model, planted(model, channels=2))
    )
    for one, another in zip(plain, changed, strict=True):
        assert_equal(one, another)


def test_each_block_is_fed_that_many_outliers() -> None:
    model = decisive("biases", dtype=torch.float32)
    chosen = set()
    for before, after in zip(fed(model), fed(planted(model, channels=3, factor=64.0)), strict=True):
        assert_equal(before[OUT], after[OUT])
        for name in SCALED:
            ratio = after[name] / before[name]
            assert sorted(ratio.tolist()) == [*[1.0] * (len(ratio) - 3), 64.0, 64.0, 64.0]
            chosen.add(tuple(ratio.argsort(descending=True, stable=True)[:3].tolist()))
    assert len(chosen) == len(SCALED) * len(model.layers), "each has channels of its own"


def test_columns_make_up_for_them() -> None:
    """Nothing else changes in a block's four weights, except for the rows of up."""
    model = decisive("gqa tied", dtype=torch.float32)
    up = model.config.intermediate_size  # the row of gate_up_proj where up begins
    for before, after in zip(model.layers, planted(model).layers, strict=True):
        ratios = {
            name: after.get_parameter(f"{name}.weight") / before.get_parameter(f"{name}.weight") for name in LINEARS
        }
        assert bool((ratios[OUT] == 1).all())
        columns = {name: ratios[name][0] for name in SCALED}
        for name, ratio in columns.items():
            assert sorted(ratio.tolist()) == [*[1 / 32] * 4, *[1.0] * (len(ratio) - 4)], name
        assert_equal(ratios[QKV], columns[QKV].expand_as(ratios[QKV]))
        assert_equal(ratios[DOWN], columns[DOWN].expand_as(ratios[DOWN]))
        assert_equal(ratios[GATE_UP][:up], columns[GATE_UP].expand(up, -1))
        assert_equal(ratios[GATE_UP][up:], columns[GATE_UP] / columns[DOWN][:, None])


def test_the_seed_chooses_the_channels() -> None:
    model = decisive(dtype=torch.float32)
    first, again, other = (planted(model, seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["layers.0.input_layernorm.weight"], other["layers.0.input_layernorm.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 0}, "channels is 0; legal: 1 to 16"),
        ({"channels": 17}, "channels is 17; legal: 1 to 16"),
        ({"factor": 24.0}, "factor is 24.0; legal: a power of two, 2 to 65536"),
        ({"factor": 0.5}, "factor is 0.5; legal: 2 to 65536"),
        ({"factor": float("inf")}, "factor is inf; legal: 2 to 65536"),
    ],
)
def test_what_is_illegal_is_named_and_changes_nothing(options: dict[str, Any], message: str) -> None:
    model = small()
    with pytest.raises(ValueError, match=f"^{message}$"):
        plant_outliers(model, **options)
    assert all(bool((parameter == 0.5).all()) for parameter in model.parameters())


def small(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=8,
    )
    model = LlamaForCausalLM(config, dtype)
    for parameter in model.parameters():
        parameter.fill_(0.5)
    return model


def test_float16_is_refused_for_it_would_lose_bits_of_small_columns() -> None:
    with pytest.raises(ValueError, match=r"^model is in torch.float16; legal: torch.float32 or torch.bfloat16$"):
        plant_outliers(small(torch.float16))


def test_packed_layers_are_refused() -> None:
    model = small()
    packing.apply(model, "int8", progress=False)
    with pytest.raises(ValueError, match=r"^model has a Int8Linear; legal: dense layers, as of quantization=None$"):
        plant_outliers(model)
