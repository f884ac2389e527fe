"""The oracle against other implementations of the same formulas: transformers, torch, and loops over single numbers."""

from __future__ import annotations

import cmath
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastllama.layers.config import LlamaConfig
from fastllama.verify import oracle
from tests.io.checkpoints import hf_state, random_llama

torch.set_num_threads(1)

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
MODELS: dict[str, dict[str, Any]] = {
    "mha": {"kv_heads": 16},
    "gqa": {"kv_heads": 4},
    "mqa, tied": {"kv_heads": 1, "tied": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
    "llama3 rope": {"rope_parameters": LLAMA3},
    "yarn rope": {"rope_parameters": YARN},
    "yarn rope, other settings": {
        "rope_parameters": YARN | {"beta_fast": 4, "attention_factor": 2.0, "truncate": False}
    },
    "dynamic rope": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
}


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_hidden_states_and_logits_are_those_of_transformers(name: str) -> None:
    """Both in fp64. What is left is transformers' cos and sin, which stay fp32: about 1e-7 of each angle."""
    model = random_llama(**MODELS[name], max_position_embeddings=48).double()
    ids = torch.randint(40, (48,))
    config = LlamaConfig.from_hf(model.config.to_dict() | {"dtype": "float32"})
    theirs = model(ids[None], output_hidden_states=True)
    *layers, logits = oracle.forward(config, hf_state(model), ids, torch.float64, 48)
    assert len(layers) == 2
    torch.testing.assert_close(layers[0], theirs.hidden_states[1][0], rtol=2e-6, atol=2e-6)
    assert_close(logits, theirs.logits[0])
    if config.rope_scaling is not None and config.rope_scaling.kind != "dynamic":
        *_, unscaled = oracle.forward(replace(config, rope_scaling=None), hf_state(model), ids, torch.float64, 48)
        with pytest.raises(AssertionError):
            assert_close(unscaled, theirs.logits[0])


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((found - expected).abs().max() / expected.abs().max()) < 2e-6


def test_dynamic_rope_grows_its_base_beyond_the_trained_length() -> None:
    """Its base at twice the length and factor 2: theta * (2 * 2 - 1)^(d / (d - 2)) (bloc97, 2023)."""
    model = random_llama(**MODELS["dynamic rope"], max_position_embeddings=32)
    config = LlamaConfig.from_hf(model.config.to_dict() | {"dtype": "float32"})
    positions = torch.arange(64)
    found = oracle.angles(config, positions, 64)
    base = 10000.0 * 3 ** (config.head_dim / (config.head_dim - 2))
    exponents = [-2 * i / config.head_dim for i in range(config.head_dim // 2)]
    expected = torch.tensor([[position * base**exponent for exponent in exponents] for position in range(64)])
    torch.testing.assert_close(found, expected.double(), rtol=1e-6, atol=0)


def test_angles_are_multiplied_in_fp32_and_exact_from_there() -> None:
    config = LlamaConfig.preset("llama-2-7b")
    found = oracle.angles(config, torch.tensor([0, 1, 1000]), 4096)
    frequency = 1.0 / 10000.0 ** (torch.arange(0, 128, 2).float() / 128)
    assert found.dtype == torch.float64
    assert torch.equal(found[2], (1000.0 * frequency).double())
    following = oracle.angles(config, torch.tensor([0, 1, 1000]), 4096, next_frequencies=True)[1].float()
    assert torch.equal(following.view(torch.int32), frequency.view(torch.int32) + 1)


def test_a_low_dtype_is_rounded_in_every_step() -> None:
    """The yardstick must err as plain torch does, or the bound made of it would be too tight, or too loose."""
    model = random_llama()
    config = LlamaConfig.from_hf(model.config.to_dict() | {"dtype": "float32"})
    ids = torch.randint(40, (16,))
    state = {name: tensor.bfloat16() for name, tensor in hf_state(model).items()}
    with torch.inference_mode():
        *_, exact = oracle.forward(config, state, ids, torch.float64, 16)
        *_, plain = oracle.forward(config, state, ids, torch.bfloat16, 16)
        theirs = model.bfloat16()(ids[None]).logits[0]
    assert plain.dtype == torch.bfloat16
    errors = [float((logits.double() - exact).abs().max()) for logits in (plain, theirs)]
    assert errors[1] / 3 < errors[0] < errors[1] * 3


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("len_q", "len_k"), [(4, 4), (3, 7), (5, 2), (1, 1)])
def test_attention_is_its_formula(len_q: int, len_k: int, causal: bool) -> None:
    q, k, v = (torch.randn(length, heads, 6).double() for length, heads in ((len_q, 4), (len_k, 2), (len_k, 2)))
    out, lse = oracle.attention(q, k, v, 0.3, causal)
    for i in range(len_q):
        for head in range(4):
            seen = range(min(len_k, i + len_k - len_q + 1) if causal else len_k)
            weights = [math.exp(0.3 * float(q[i, head] @ k[j, head // 2])) for j in seen]
            total = sum(weights)
            if not weights:
                assert (out[i, head] == 0).all()
                assert lse[i, head] == -math.inf
                continue
            expected = sum(weight / total * v[j, head // 2] for weight, j in zip(weights, seen, strict=True))
            torch.testing.assert_close(out[i, head], expected)
            assert float(lse[i, head]) == pytest.approx(math.log(total))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotated", [8, 4])
def test_rotation_is_a_complex_multiplication(rotated: int, interleaved: bool) -> None:
    x, turns = torch.randn(5, 3, 8).double(), torch.randn(5, rotated // 2).double()
    found = oracle.rotate(x, turns.cos(), turns.sin(), interleaved)
    half = rotated // 2
    for token in range(5):
        for pair in range(half):
            a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + half)
            number = complex(x[token, 1, a], x[token, 1, b]) * cmath.exp(1j * float(turns[token, pair]))
            assert [float(found[token, 1, i]) for i in (a, b)] == pytest.approx([number.real, number.imag])
    assert torch.equal(found[..., rotated:], x[..., rotated:])


def test_the_norm_and_the_activation() -> None:
    x, weight = torch.randn(3, 10).double(), torch.randn(10).double()
    torch.testing.assert_close(oracle.rms_norm(x, weight, 1e-5), F.rms_norm(x, (10,), weight, 1e-5))
    torch.testing.assert_close(oracle.silu_mul(x), x[:, :5] / (1 + (-x[:, :5]).exp()) * x[:, 5:])
