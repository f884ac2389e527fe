"""Scales moved between a layer's input and its weight leave a block's output unchanged."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastllama.layers.block import LlamaBlock
from fastllama.layers.config import LlamaConfig
from fastllama.layers.model import LlamaForCausalLM
from fastllama.layers.rescaling import DOWN, GATE_UP, LINEARS, OUT, QKV, rescale, tied
from fastllama.layers.weights import hf_tensors
from fastllama.verify import oracle

GQA = LlamaConfig(
    vocab_size=40,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    eos_token_ids=(),
)
SHAPES = {
    "MHA": replace(GQA, num_key_value_heads=4),
    "GQA": GQA,
    "MQA": replace(GQA, num_key_value_heads=1),
    "biases": replace(GQA, attention_bias=True, mlp_bias=True),
    "narrow heads": replace(GQA, head_dim=6),
}
IDS = torch.arange(30) * 7 % 40
shapes = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)


def model(config: LlamaConfig, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    built = LlamaForCausalLM(config, dtype)
    torch.manual_seed(1)
    for parameter in built.parameters():
        parameter.data.normal_(0, 0.2 if parameter.dim() == 2 else 1)
    return built


def block_of(built: LlamaForCausalLM) -> LlamaBlock:
    (block,) = built.layers
    assert isinstance(block, LlamaBlock)
    return block


def output(built: LlamaForCausalLM) -> Tensor:
    """The residual stream after the block, in fp64 and by explicit formulas."""
    weights = {name: tensor.double() for name, tensor in hf_tensors(built)}
    return next(oracle.forward(built.config, weights, IDS, torch.float64, len(IDS)))


def scales_for(config: LlamaConfig, name: str, spread: float = 1.0) -> Tensor:
    """Random scales, from about 1 / 50 to 50."""
    sizes = {QKV: config.hidden_size, OUT: config.q_size, GATE_UP: config.hidden_size, DOWN: config.intermediate_size}
    return tied(config, name, (torch.randn(sizes[name]) * 2 * spread).exp(), "amax")


@shapes
@pytest.mark.parametrize("names", [*((each,) for each in LINEARS), LINEARS], ids=[*LINEARS, "all"])
def test_a_block_gives_what_it_gave(config: LlamaConfig, names: tuple[str, ...]) -> None:
    """But for fp32's rounding of weights, each of them twice at most."""
    built = model(config)
    before, weights = output(built), {name: tensor.clone() for name, tensor in built.named_parameters()}
    for name in names:
        rescale(block_of(built), config, name, scales_for(config, name), torch.float32)
    after = output(built)
    assert (after - before).norm() < 1e-6 * before.norm()
    changed = {name for name, tensor in built.named_parameters() if not torch.equal(tensor, weights[name])}
    assert {f"layers.0.{name}.weight" for name in names} <= changed


@pytest.mark.parametrize(
    ("name", "divided", "rows"),
    [
        (QKV, "input_layernorm.weight", slice(None)),
        (OUT, "self_attn.qkv_proj.weight", slice(96, 128)),
        (OUT, "self_attn.qkv_proj.bias", slice(96, 128)),
        (GATE_UP, "post_attention_layernorm.weight", slice(None)),
        (DOWN, "mlp.gate_up_proj.weight", slice(80, 160)),
        (DOWN, "mlp.gate_up_proj.bias", slice(80, 160)),
    ],
)
def test_what_is_divided_and_what_stays(name: str, divided: str, rows: slice) -> None:
    """q and k, gate and the biases of the layers themselves stay: the softmax and silu are not linear."""
    config = SHAPES["biases"]
    built = model(config)
    before = copy.deepcopy(block_of(built))
    scales = scales_for(config, name)
    torch.testing.assert_close(rescale(block_of(built), config, name, scales, torch.float32), scales, rtol=1e-6, atol=0)
    found, expected = block_of(built).get_parameter(divided), before.get_parameter(divided).clone()
    by = scales[[*range(16), *range(32, 48)]] if name == OUT else scales
    expected[rows] /= by.view(-1, *[1] * (expected.dim() - 1))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    kept = torch.ones(len(found), dtype=torch.bool)
    kept[rows] = False
    assert torch.equal(found[kept], before.get_parameter(divided)[kept])
    weight = f"{name}.weight"
    torch.testing.assert_close(
        block_of(built).get_parameter(weight), before.get_parameter(weight) * scales, rtol=1e-6, atol=0
    )
    others = {each for each, _ in before.named_parameters()} - {weight, divided, divided.replace("bias", "weight")}
    others -= {divided.replace("weight", "bias")}
    for each in others:
        assert torch.equal(block_of(built).get_parameter(each), before.get_parameter(each)), each


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [QKV, GATE_UP])
def test_columns_make_up_for_the_rounding_of_a_norm(name: str, dtype: torch.dtype) -> None:
    """The norm is one of dtype then, and the block gives what it gave to fp32's rounding, not to dtype's."""
    built = model(GQA)
    block = block_of(built)
    norm = block.input_layernorm if name == QKV else block.post_attention_layernorm
    norm.weight.copy_(norm.weight.to(dtype))
    before, scales = output(built), scales_for(GQA, name)
    columns = rescale(block, GQA, name, scales, dtype)
    assert torch.equal(norm.weight.to(dtype).float(), norm.weight)
    assert (output(built) - before).norm() < 1e-6 * before.norm()
    assert not torch.equal(columns, scales)
    torch.testing.assert_close(columns, scales, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**30])
@pytest.mark.parametrize("name", [QKV, GATE_UP])
def test_a_norm_that_its_dtype_cannot_hold_is_not_divided(name: str, scale: float) -> None:
    """In float16 1 / 2^-20 is infinite, and 1 / 2^30 is 0: the channel would be lost."""
    built = model(GQA)
    block = block_of(built)
    norm = block.input_layernorm if name == QKV else block.post_attention_layernorm
    norm.weight.copy_(norm.weight.half())
    before, kept = output(built), norm.weight.clone()
    scales = torch.ones(GQA.hidden_size)
    scales[5] = scale
    columns = rescale(block, GQA, name, scales, torch.float16)
    assert torch.equal(norm.weight, kept)
    assert torch.equal(columns, torch.ones(GQA.hidden_size))
    assert torch.equal(output(built), before)


@pytest.mark.parametrize("name", [QKV, GATE_UP])
def test_a_channel_that_its_norm_turns_off_stays_off(name: str) -> None:
    built = model(GQA)
    block = block_of(built)
    norm = block.input_layernorm if name == QKV else block.post_attention_layernorm
    norm.weight[3] = 0
    before = output(built)
    columns = rescale(block, GQA, name, scales_for(GQA, name), torch.bfloat16)
    assert columns.isfinite().all()
    assert norm.weight[3] == 0
    assert (output(built) - before).norm() < 1e-6 * before.norm()


@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_powers_of_two_are_exact_in_any_dtype(config: LlamaConfig, dtype: torch.dtype) -> None:
    built = model(config, dtype)
    before, originals = output(built), copy.deepcopy(block_of(built))
    found = []
    for name in LINEARS:
        scales = tied(config, name, torch.randint(-5, 6, scales_for(config, name).shape).float(), "amax").exp2()
        found.append((name, scales))
        assert torch.equal(rescale(block_of(built), config, name, scales, dtype), scales)
    assert torch.equal(output(built), before)
    for name, scales in found:
        rescale(block_of(built), config, name, 1 / scales, dtype)
    for name, tensor in block_of(built).named_parameters():
        assert torch.equal(tensor, originals.get_parameter(name)), name


def test_channels_of_query_heads_that_read_one_value_have_one_number() -> None:
    """Heads 0 and 1 read the first key-value head, 2 and 3 the second."""
    channels = torch.arange(64.0)
    found = tied(GQA, OUT, channels, "amax").view(4, 16)
    assert torch.equal(found[0], torch.arange(16.0, 32.0))
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], torch.arange(48.0, 64.0))
    assert torch.equal(found[3], found[2])
    assert torch.equal(tied(GQA, OUT, channels, "mean").view(4, 16)[0], torch.arange(8.0, 24.0))
    assert torch.equal(tied(SHAPES["MHA"], OUT, channels, "mean"), channels)
    assert torch.equal(tied(SHAPES["MQA"], OUT, channels, "amax").view(4, 16)[2], channels[48:])
    for name in (QKV, GATE_UP, DOWN):
        assert torch.equal(tied(GQA, name, channels, "mean"), channels)
