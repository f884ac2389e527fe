"""Rotary frequencies and the cos/sin cache against transformers, for every kind of scaling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fastllama.layers.config import LlamaConfig
from fastllama.layers.model import LlamaForCausalLM
from fastllama.layers.rope import attention_factor, inverse_frequencies, rotary_cache

TRAINED = 128
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FROM_4096 = {"original_max_position_embeddings": 4096}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "code llama": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.5},
    "llama 3.1": LLAMA3 | {"rope_theta": 500000.0},
    "yarn": YARN,
    "yarn, whose base is trained (Yarn-Llama-2-64k)": {"type": "yarn", "factor": 16.0, "finetuned": True} | FROM_4096,
    "yarn, other settings": YARN | {"beta_fast": 16, "beta_slow": 2, "truncate": False, "rope_theta": 500000.0},
    "yarn, null for truncate, which is false": YARN | {"truncate": None, "beta_fast": 16},
    "yarn, attention factor": YARN | {"attention_factor": 1.25},
    "yarn, DeepSeek's scales": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
    "yarn, of few positions": YARN | {"original_max_position_embeddings": 4},
    "llama3, other corners": LLAMA3 | {"rope_theta": 10000.0, "low_freq_factor": 2.0, "high_freq_factor": 5.0},
}


def both(rope: dict[str, Any], head_dim: int = 64) -> tuple[transformers.LlamaConfig, LlamaConfig]:
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": head_dim}
    theirs = transformers.LlamaConfig(**sizes, **heads, max_position_embeddings=TRAINED, rope_parameters=dict(rope))
    return theirs, LlamaConfig.from_hf(theirs.to_dict())


@pytest.mark.parametrize("head_dim", [4, 64, 128])
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_frequencies(rope: dict[str, Any], head_dim: int) -> None:
    """Bit for bit, but for the last bits of blends (Llama 3, YaRN), which are the same numbers by other formulas."""
    theirs, ours = both(rope, head_dim)
    expected = LlamaRotaryEmbedding(theirs).inv_freq
    found = inverse_frequencies(ours, TRAINED)
    assert found.dtype == torch.float32
    blended = ours.rope_scaling is not None and ours.rope_scaling.kind in ("llama3", "yarn")
    tolerance = 4 * torch.finfo(torch.float32).eps if blended else 0
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("name", ["llama 3.1", "yarn"])
def test_the_corners_of_blends_are_all_met(name: str) -> None:
    """The test above covers all three: kept, blended and stretched frequencies."""
    _, scaled = both(ROPES[name])
    _, plain = both(ROPES["default"] | {"rope_theta": ROPES[name]["rope_theta"]})
    ratio, factor = inverse_frequencies(plain, TRAINED) / inverse_frequencies(scaled, TRAINED), ROPES[name]["factor"]
    assert (ratio == 1).any()
    assert (ratio == factor).any()
    assert ((ratio > 1.01) & (ratio < factor - 0.01)).any()


@pytest.mark.parametrize("length", [1, TRAINED - 1, TRAINED, TRAINED + 1, 1000])
def test_dynamic_frequencies_follow_the_longest_sequence_to_come(length: int) -> None:
    """Ours for a context of `length` are transformers' at that sequence length; unscaled within the trained context."""
    theirs, ours = both(ROPES["dynamic"])
    rotary = LlamaRotaryEmbedding(theirs)
    rotary(torch.zeros(1), torch.arange(length)[None])
    torch.testing.assert_close(inverse_frequencies(ours, length), rotary.inv_freq, rtol=1e-6, atol=0)
    if length <= TRAINED:
        _, plain = both(ROPES["default"])
        assert torch.equal(inverse_frequencies(ours, length), inverse_frequencies(plain, length))


@pytest.mark.parametrize("rope", ["yarn", "yarn, attention factor", "yarn, DeepSeek's scales"])
def test_yarn_scales_cosines_and_sines(rope: str) -> None:
    theirs, ours = both(ROPES[rope])
    rotary = LlamaRotaryEmbedding(theirs)
    assert rotary.attention_scaling > 1
    assert attention_factor(ours) == pytest.approx(rotary.attention_scaling, rel=1e-15)
    cos, sin = rotary(torch.zeros(1), torch.arange(TRAINED)[None])
    expected = torch.cat((cos[0, :, :32], sin[0, :, :32]), -1)
    # An angle of up to 128 radians has a relative error of 4 eps, so 2^-15 in all.
    torch.testing.assert_close(rotary_cache(ours, TRAINED, "cpu"), expected, rtol=0, atol=2**-14)


@pytest.mark.parametrize("rope", ["default", "linear", "dynamic"])
def test_the_cache_holds_what_transformers_computes_at_every_position(rope: str) -> None:
    theirs, ours = both(ROPES[rope])
    cos, sin = LlamaRotaryEmbedding(theirs)(torch.zeros(1), torch.arange(TRAINED)[None])
    assert torch.equal(rotary_cache(ours, TRAINED, "cpu"), torch.cat((cos[0, :, :32], sin[0, :, :32]), -1))


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_a_context_is_as_long_as_its_rope_is_made_for(rope: dict[str, Any]) -> None:
    model = LlamaForCausalLM(both(rope, 8)[1])
    longest = model.config.context_length
    assert model.cos_sin.shape == (longest, 8)
    model.set_max_model_len(7)
    assert model.cos_sin.shape == (7, 8)
    if rope.get("rope_type") == "dynamic":
        assert longest == TRAINED
        model.set_max_model_len(TRAINED + 1)
        assert torch.equal(model.cos_sin, rotary_cache(model.config, TRAINED + 1, "cpu"))
    else:
        with pytest.raises(ValueError, match=f"max_model_len is {longest + 1}; legal: 1 to {longest}"):
            model.set_max_model_len(longest + 1)
    with pytest.raises(ValueError, match="max_model_len is 0"):
        model.set_max_model_len(0)
    assert "cos_sin" not in model.state_dict()
